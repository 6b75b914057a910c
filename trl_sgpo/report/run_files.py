"""Names of the files in a run's output folder that its report reads, besides checkpoints, bank and completions."""

STATE_FILE = "trainer_state.json"  # as transformers names it in checkpoints
RUN_SETTINGS_FILE = "settings.json"
REPORT_FILE = "report.json"  # accuracy and transfer before and after training
