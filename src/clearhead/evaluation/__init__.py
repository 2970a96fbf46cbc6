"""clearhead's own models on the tasks of lm-eval (EleutherAI's lm-evaluation-harness).

    from clearhead.evaluation import run_tasks
    from clearhead.evaluation.lm_model import ClearheadLM
    print(run_tasks(ClearheadLM("runs/first"), ["my_task"], folder="tasks"))

Patched Hugging Face models need nothing of this: `HFLM(pretrained=model, tokenizer=tokenizer)` takes them as they are.
"""

from clearhead._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {
        "run_tasks": "clearhead.evaluation.tasks:run_tasks",
        "TaskScore": "clearhead.evaluation.tasks:TaskScore",
    },
)
