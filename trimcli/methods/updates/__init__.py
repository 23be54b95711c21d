"""Weight updates: what the kept weights do about those that go."""
