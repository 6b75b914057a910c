"""A run as one HTML file: reading its records (`records.py`), charts (`charts.py`), the page (`page.py`)."""
