"""Names of the files in a run's output folder, besides those of the model, checkpoints, bank and completions."""

RUN_FILE = "run.json"  # the id of the run, in its checkpoints too
COMPLETIONS_DIRECTORY = "completions"  # as TRL names it
EARLIER_DIRECTORY = "earlier"  # what earlier runs left
STATE_FILE = "trainer_state.json"  # as transformers names it in checkpoints
PROGRESS_FILE = "progress.jsonl"  # metrics of each logged step, while training goes on
TEACHER_FILE = "teacher.safetensors"  # of a checkpoint: the copy of the weights that `internalize` learns from
REFERENCE_FILE = "reference.safetensors"  # of a checkpoint: the reference model that `sync_ref_model` moves
RUN_SETTINGS_FILE = "settings.json"
REPORT_FILE = "report.json"  # accuracy and transfer before and after training
BEFORE_FILE = "before.json"  # those before it, while training goes on
REPORT_PAGE = "report.html"
