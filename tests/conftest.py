import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and files run beside each other
os.environ.setdefault("CI", "1")  # TRL sends no telemetry from a run that says so
os.environ.setdefault("HF_HUB_OFFLINE", "1")
