"""The paper's comparison in small, on Fashion-MNIST."""
