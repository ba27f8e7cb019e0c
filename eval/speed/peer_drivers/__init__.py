"""Programs that drive another engine, each run by the interpreter in which that engine is installed.

They import nothing of specdec, only the standard library and the engine: `specdec.eval.speed.peers` starts them.
"""
