"""The acceptance-rate benchmark: `specdec eval acceptance` and `teacher-forced`.

plan -> run (generate, analyse, store) -> metrics (records, intervals) -> results, live, plots, html. `laws` has the
exact acceptance that follows from the model's distributions, `replay` computes these distributions at given contexts,
`analyse` at an engine's own verifications, `teacher` on given text; `experts` counts distinct experts.
"""
