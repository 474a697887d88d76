"""Where pages live: three tiers, their budgets, and who answers for what."""
