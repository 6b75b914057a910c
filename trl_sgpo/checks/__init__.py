"""What a user can mend, told before long work: keys and values of a recipe, packages, paths, errors of libraries."""
