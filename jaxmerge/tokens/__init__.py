"""Pillar 1: which tokens become one? Every planner is a pure function that returns a `Plan` or a `SoftPlan`."""
