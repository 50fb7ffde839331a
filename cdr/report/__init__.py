"""The report pages of runs: what came out, whether to trust it, where rewards come from.

    annotate:  tables ─► annotation_gather ─► AnnotationData ─► annotation_page, annotation_verdict
    evaluate:  tables ─► evaluation        ─► EvaluationData ─► evaluation_page, evaluation_verdict

Both sit on one base: the frame and its parts (`html`, `*.html.jinja`), plots, pairs token by token
(`pairs`, `tokens`), how a reward is spoken of (`reward_text`) and how findings are told
(`verdict`). Only aggregates and small samples come to the driver; a page is one HTML file that
loads nothing. `build` makes the page of a run that ends, or of an earlier one from its tables.
"""
