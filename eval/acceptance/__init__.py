"""The acceptance-rate benchmark: `specdec eval acceptance`, `teacher-forced` and `replay`.

plan -> run (generate, analyse, store) -> metrics (records, intervals) -> results, live, plots, html. `laws` has the
exact acceptance that follows from the model's laws, `replay` computes those laws at given contexts, `analyse` at an
engine's own verifications, `teacher` on given text; `recording` keeps them in a file; `experts` counts distinct
experts.
"""
