"""What a training will do: FinetunePlan, make_plan(...)."""
