// The Python module croc_kernels._C. It holds nothing: importing it runs the static registrations of the operator
// files (STABLE_TORCH_LIBRARY_IMPL). Schemas and fake kernels live in croc_kernels/ops.py.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
