"""Parameters of a loaded model under masks: Held(linears, keep_of), hold(optimizer)."""
