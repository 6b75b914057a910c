import os


os.environ.setdefault("CI", "1")  # TRL sends no telemetry from a run that says so
os.environ.setdefault("HF_HUB_OFFLINE", "1")
