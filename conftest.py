"""Which files pytest leaves alone."""

# They need packages of their own extras; tests/test_optim_keras.py, test_optim_optax.py and test_lightning.py run them.
collect_ignore = ["steadyrank/optim/keras.py", "steadyrank/optim/optax.py", "steadyrank/lightning.py"]
