"""`clearhead bench`: what an attention costs, as a ratio to PyTorch's own, beside other libraries at their best.

    from clearhead.bench import Plan, run
    record = run(Plan(operations=("forward",), lengths=(512,)))      # what the JSON file holds

Operations and competitors are listed in `registry.py`, how they are timed stands in `timing.py`, the page is made by
`page.py` from JSON alone.
"""

from clearhead._lazy import attach

_NAMES = {
    "COMPETITORS": "clearhead.bench.registry:COMPETITORS",
    "OPERATIONS": "clearhead.bench.registry:OPERATIONS",
    "Competitor": "clearhead.bench.registry:Competitor",
    "Plan": "clearhead.bench.plan:Plan",
    "make_page": "clearhead.bench.page:make_page",
    "run": "clearhead.bench.run:run",
}
__all__ = ["COMPETITORS", "OPERATIONS", "Competitor", "Plan", "make_page", "run"]
__getattr__, __dir__ = attach(__name__, _NAMES)
