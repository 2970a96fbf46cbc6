"""The signal room: predict, measure and explain how signal and gradient flow; see docs/signal.md."""

from clearhead._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "predict": "clearhead.signal.inspection:predict",
        "measure": "clearhead.signal.measurement:measure",
        "inspect": "clearhead.signal.inspection:inspect",
        "Moments": "clearhead.signal.moments.types:Moments",
        "GradientMoments": "clearhead.signal.moments.types:GradientMoments",
        "Trace": "clearhead.signal.trace:Trace",
        "Report": "clearhead.signal.findings:Report",
    },
)
