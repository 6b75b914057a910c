"""A run as one HTML file: read (`run.py`), drawn (`charts.py`), written (`page.py`)."""
