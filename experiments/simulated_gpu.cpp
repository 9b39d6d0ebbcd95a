// What PyTorch needs to know of a CUDA device that computes nothing: that there are two of them,
// which is the current one, and that streams and events never wait. Tensors are fake (simulated.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using Simulated = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;  // PyTorch's own, for tests

namespace at {
C10_REGISTER_GUARD_IMPL(CUDA, Simulated);

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 2; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex current_device() const override { return Simulated::getDeviceIndex(); }
  DeviceIndex getCurrentDevice() const override { return Simulated::getDeviceIndex(); }
  void setCurrentDevice(DeviceIndex index) const override { Simulated::setDeviceIndex(index); }
  void deviceSynchronize(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
