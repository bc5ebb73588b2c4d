// Stands in for NVIDIA's driver where there is none: it loads, and knows no device. `scripts/fetch-providers.py`
// builds it as libcuda.so.1.

// The only symbol that the CUDA provider is linked against. 3 is CUDA_ERROR_NOT_INITIALIZED.
int cuTensorMapEncodeTiled(void) { return 3; }
