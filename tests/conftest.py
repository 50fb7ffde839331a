"""What all tiers of tests share.

Property tests try the same examples every time, so that a failure is a change's and not the day's;
`pytest --hypothesis-profile=default` draws others.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.load_profile("fixed")
