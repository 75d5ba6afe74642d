"""mae_et: masked autoencoders pre-trained under the EfficientTrain++ curriculum."""

__version__ = "0.1.0"
