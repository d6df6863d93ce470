"""Which files pytest leaves alone."""

# They need packages of their own extras; tests/test_optim_keras.py and tests/test_optim_optax.py run their examples.
collect_ignore = ["steadyrank/optim/keras.py", "steadyrank/optim/optax.py"]
