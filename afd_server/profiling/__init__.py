"""`afd profile`: what a model's attention, FFN and wire take on this machine, measured in the server's own workers.

Above the workers that it measures; the fit and the file are the planner's, which knows no torch.
"""
