"""The demo: federated multimodal reconstruction from noisy, undersampled scans."""
