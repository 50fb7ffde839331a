"""Prompt packs: the instructions and exemplars that turn a prompt x into T(x), per domain.

A pack is one YAML file. Its layout is Jinja, rendered in a sandbox; what users wrote enters as
values only and is never read as a template. A domain without instructions is vanilla: T(x) = x.

Which instruction and which exemplar a prompt draws is decided by rendezvous hashing: every id gets
a weight from a hash of (seed, domain, id, prompt), and the highest wins. So an edited text moves
no prompt, a new exemplar takes over only the prompts it wins, and a removed one gives back only
its own. Ids are therefore names to keep: renaming one is removing it and adding another.

Source: arXiv 2411.02481, section 3.2. The texts and their layout are this project's own, not the
paper's. Nothing here knows tokens or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from cdr.config import content_hash
from cdr.config_files import Spec, validate_config
from cdr.errors import ConfigError, RejectReason, RowRejected
from cdr.text_files import read_text

if TYPE_CHECKING:
    from cdr.chat import Message

# Surrounding blanks are the YAML's, not the text's: they must not move the pack's key.
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Line = Annotated[Text, StringConstraints(pattern=r"^[^\n]*$")]
Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_\-]*$")]

_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined)


def render(source: str, **values: object) -> str:
    """Render a pack's template; values are inserted as they are.

    Raises:
        jinja2.TemplateError: it uses a value that is not given, or reaches out of the sandbox.
    """
    return _compile(source).render(values)


@lru_cache(maxsize=64)
def _compile(source: str) -> Template:
    return _SANDBOX.from_string(source)


def _template(*names: str) -> AfterValidator:
    """Make the check of a template that may use these variables."""

    def check(source: str) -> str:
        try:
            used = meta.find_undeclared_variables(_SANDBOX.parse(source))
        except TemplateError as error:
            raise ValueError(f"not a Jinja template: {error}") from None
        if unknown := sorted(used - set(names)):
            raise ValueError(f"uses {', '.join(unknown)}; known here: {', '.join(names)}")
        return source

    return AfterValidator(check)


class Exemplar(Spec):
    """One worked example of a domain's criteria."""

    user: Text = Field(description="What a user asked.")
    good: Text = Field(description="The answer to prefer.")
    bad: Text = Field(description="The answer to avoid.")
    why: Text = Field(description="What makes the difference.")


class Layout(Spec):
    """Where instruction, exemplar and the user's text stand in T(x); Jinja templates."""

    placement: Literal["user", "system"] = Field(
        "user",
        description="`user`: in the last user turn. `system`: in the system message, merged with "
        "the prompt's own, which keeps one shared prefix for multi-turn prompts too.",
    )
    criteria: Annotated[Text, _template("instruction", "exemplar")] = Field(
        description="Instruction and exemplar (none where it is left out) as one text."
    )
    user_turn: Annotated[Text, _template("criteria", "query")] = Field(
        description="The last user turn with placement `user`."
    )
    system_turn: Annotated[Text, _template("criteria", "system")] = Field(
        description="The system message with placement `system`; `system` is none without one."
    )

    @model_validator(mode="after")
    def _keeps_texts_verbatim(self) -> Self:
        probe = "{{ probe }} <&>\n  'kept' \\as it is"
        exemplar = Exemplar(user=probe, good=probe, bad=probe, why=probe).model_dump()
        renders: tuple[tuple[str, dict[str, Any], int], ...] = (
            ("criteria", {"instruction": probe, "exemplar": exemplar}, 5),
            ("criteria", {"instruction": probe, "exemplar": None}, 1),
            ("user_turn", {"criteria": probe, "query": probe}, 2),
            ("system_turn", {"criteria": probe, "system": probe}, 2),
            ("system_turn", {"criteria": probe, "system": None}, 1),
        )
        problems = []
        for field, values, count in renders:
            try:
                found = render(getattr(self, field), **values).count(probe)
            except (TemplateError, TypeError) as error:
                problems.append(f"{field}: does not render: {error}")
                continue
            if found != count:
                problems.append(
                    f"{field}: must hold {count} texts verbatim, once each; got {found}"
                )
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self


class Domain(Spec):
    """A kind of prompt with its own idea of a better answer."""

    description: Line = Field(description="One line for the router.")
    router_label: Line = Field(description="The router's answer that means this domain.")
    instructions: dict[Id, Text] = Field(
        default_factory=dict, description="Criteria by id; none: the prompt stays untouched."
    )
    exemplars: dict[Id, Exemplar] = Field(default_factory=dict, description="Exemplars by id.")

    @property
    def is_vanilla(self) -> bool:
        """Whether prompts of this domain stay untouched."""
        return not self.instructions

    @model_validator(mode="after")
    def _exemplars_follow_instructions(self) -> Self:
        if self.exemplars and not self.instructions:
            raise ValueError("exemplars: need at least one instruction to go with")
        return self


class RouterSpec(Spec):
    """How the router model is asked; `cdr.router` does the asking."""

    domains: tuple[Id, ...] = Field(
        min_length=1,
        description="Domains the router may choose, in the order they are listed to it. The "
        "others are reached by `column`, `fixed` or `routing.domains` only.",
    )
    system: Annotated[Text, _template("domains")] = Field(
        description="System message; `domains` is a list of label and description."
    )
    task: Annotated[Text, _template("domains", "conversation")] = Field(
        description="User turn; `conversation` is the transcript to classify."
    )
    earlier_turn_chars: int = Field(
        200, ge=0, description="Characters shown of each turn before the last user turn."
    )


@dataclass(frozen=True)
class Conditioned:
    """T(x), with what was drawn for it.

    Args:
        messages: T(x); the very messages of x in a vanilla domain.
        instruction_id: the instruction drawn; None in a vanilla domain.
        exemplar_id: the exemplar drawn; None where there is none, or it was left out.
        criteria: instruction and exemplar by themselves, as they stand in T(x); None in a vanilla
            domain.
    """

    messages: list[Message]
    instruction_id: str | None
    exemplar_id: str | None
    criteria: str | None = None


class PromptPack(Spec):
    """Domains, their texts and the layout: all that T depends on besides the prompt and seed."""

    name: Id = Field(description="Name people call it by.")
    version: int = Field(ge=1, description="Raised with every change of a text.")
    layout: Layout
    router: RouterSpec
    domains: dict[Id, Domain] = Field(min_length=1, description="Domains by name.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [
            f"router.domains: '{name}' is not in domains: {', '.join(self.domains)}"
            for name in self.router.domains
            if name not in self.domains
        ]
        if len(set(self.router.domains)) != len(self.router.domains):
            problems.append("router.domains: each may stand once")
        owners: dict[str, str] = {}
        for name, domain in self.domains.items():
            if (owner := owners.setdefault(domain.router_label, name)) != name:
                problems.append(f"domains.{name}.router_label: is taken by '{owner}'")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @cached_property
    def key(self) -> str:
        """Sha256 hex of the content that decides T: layout, ids and texts, not their order.

        Name, version and the router's texts are left out: none of them changes a T(x).
        """
        texts = {
            name: domain.model_dump(include={"instructions", "exemplars"})
            for name, domain in self.domains.items()
        }
        return content_hash({"layout": self.layout.model_dump(), "domains": texts})

    @property
    def router_domains(self) -> tuple[str, ...]:
        """Domains the router may choose when the config does not say."""
        return self.router.domains

    def condition(
        self,
        messages: Sequence[Message],
        domain: str,
        prompt_hash: str,
        seed: int,
        *,
        with_exemplar: bool = True,
    ) -> Conditioned:
        """Turn x into T(x).

        Args:
            messages: x, ending with a user turn; never changed in place.
            domain: a domain of this pack.
            prompt_hash: sha256 hex of the canonical JSON of `messages`; decides the draw.
            seed: seed of the draw.
            with_exemplar: False leaves the exemplar out and keeps the instruction.

        Raises:
            RowRejected: the domain is not in the pack (`unknown_domain`), or the last message is
                not a user's (`bad_messages`).
        """
        if domain not in self.domains:
            raise RowRejected(
                RejectReason.UNKNOWN_DOMAIN,
                f"domain {domain!r} is not in prompt pack '{self.name}': "
                f"{', '.join(sorted(self.domains))}",
            )
        spec = self.domains[domain]
        if spec.is_vanilla:
            return Conditioned(list(messages), None, None)
        if not messages or messages[-1]["role"] != "user":
            raise RowRejected(RejectReason.BAD_MESSAGES, "the last message is not a user's")

        def draw(kind: str, ids: Iterable[str]) -> str:
            return _draw_id(ids, (str(seed), domain, kind, prompt_hash))

        instruction_id = draw("instruction", spec.instructions)
        exemplar_id = draw("exemplar", spec.exemplars) if with_exemplar and spec.exemplars else None
        criteria = render(
            self.layout.criteria,
            instruction=spec.instructions[instruction_id],
            exemplar=spec.exemplars[exemplar_id].model_dump() if exemplar_id else None,
        )
        return Conditioned(self._place(messages, criteria), instruction_id, exemplar_id, criteria)

    def _place(self, messages: Sequence[Message], criteria: str) -> list[Message]:
        if self.layout.placement == "user":
            turn = render(self.layout.user_turn, criteria=criteria, query=messages[-1]["content"])
            return [*messages[:-1], {"role": "user", "content": turn}]
        has_system = messages[0]["role"] == "system"
        own = messages[0]["content"] if has_system else None
        turn = render(self.layout.system_turn, criteria=criteria, system=own)
        return [{"role": "system", "content": turn}, *messages[has_system:]]


def load_prompt_pack(path: str | Path) -> PromptPack:
    """Read a prompt pack.

    Args:
        path: the YAML file: a path, a URI, or `conf/...` for one of the package's own.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        tree = yaml.load(read_text(str(path)), _UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"], fix="see the files in conf/prompts/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"cannot be read as YAML: {error}"], where=str(path)) from None
    if not isinstance(tree, Mapping):
        raise ConfigError(
            [f"expected a mapping of keys, got {type(tree).__name__}"], where=str(path)
        )
    return validate_config(PromptPack, path, tree)


def _draw_id(ids: Iterable[str], salt: Sequence[str]) -> str:
    """Draw the id of highest weight (rendezvous hashing); ids and salt hold no newline."""

    def weight(candidate: str) -> bytes:
        return hashlib.sha256("\n".join((*salt, candidate)).encode()).digest()

    return max(ids, key=weight)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice: plain YAML keeps the last and drops an exemplar."""


def _construct_unique(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        if key_node.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
            )
        seen.add(key_node.value)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.Resolver.DEFAULT_MAPPING_TAG, _construct_unique)
