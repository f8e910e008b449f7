"""Join the parts into programs: training, evaluation, alternates."""
