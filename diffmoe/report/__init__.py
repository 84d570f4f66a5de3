"""Tables, figures and verdicts, made from records and the paper's numbers."""
