"""DARE inside OpenCompass, which stays as it is: a model class, inferencers, data sets, evaluators, configurations."""
