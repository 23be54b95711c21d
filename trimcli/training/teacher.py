"""The full-vocabulary Kullback-Leibler divergence to a teacher: open_teacher, Teacher.divergence."""
