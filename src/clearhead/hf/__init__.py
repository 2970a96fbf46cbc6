"""Any Hugging Face model, with another attention in one line.

    report = ch.hf.patch(model, "laser")
    ch.hf.unpatch(model)

Needs transformers (`pip install 'clearhead[hf]'`). Names are imported on first use.
"""

from clearhead._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "patch": "clearhead.hf.patching:patch",
        "unpatch": "clearhead.hf.patching:unpatch",
        "load": "clearhead.hf.store:load",
        "PatchReport": "clearhead.hf.report:PatchReport",
        "LayerReport": "clearhead.hf.report:LayerReport",
        "TemperatureOptions": "clearhead.hf.options:TemperatureOptions",
        "temperature_parameters": "clearhead.hf.temperatures:temperature_parameters",
        "freeze_all_but_temperatures": "clearhead.hf.temperatures:freeze_all_but_temperatures",
    },
)
