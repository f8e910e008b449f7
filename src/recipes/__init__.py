"""The programs that join the parts: training, evaluation, alternates, studies."""
