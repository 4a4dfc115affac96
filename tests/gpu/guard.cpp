// A device guard that does nothing: a CPU build of torch refuses to index or copy tensors that say they are on CUDA without one.
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>()); }
