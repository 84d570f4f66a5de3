"""MLflow: training runs while they train (live.py), records once measured (publish.py), in one store (store.py)."""
