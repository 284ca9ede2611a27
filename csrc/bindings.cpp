// gradext._C: what Python calls. Tensors cross as addresses, sizes and strides, so one build serves every
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/workspace.h"
#include "device.h"
#include "outer.h"
#include "sq_norm.h"

#define GRADEXT_STRING_(x) #x
#define GRADEXT_STRING(x) GRADEXT_STRING_(x)

namespace py = pybind11;

namespace {

using gradext::DType;
using gradext::OuterParams;

// The integers of one problem, in a tuple: a function may take many problems.
class Fields {
 public:
  Fields(const py::tuple& fields, std::size_t expected) : fields_(fields) {
    if (fields.size() != expected)
      throw std::invalid_argument("gradext: expected a tuple of " + std::to_string(expected) + " integers, but got " +
                                  std::to_string(fields.size()));
  }
  std::int64_t next() {
    const std::int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(fields_.ptr(), next_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  void* pointer() { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(next())); }
  DType dtype() { return static_cast<DType>(next()); }

 private:
  const py::tuple& fields_;
  py::ssize_t next_ = 0;
};

// (delta, activation, out, B, T, O, I, strides of delta, activation and out, in_dtype, out_dtype)
OuterParams outer_params(const py::tuple& problem) {
  Fields fields(problem, 17);
  OuterParams p{};
  p.delta = fields.pointer(), p.activation = fields.pointer(), p.out = fields.pointer();
  p.B = fields.next(), p.T = fields.next(), p.O = fields.next(), p.I = fields.next();
  p.delta_b = fields.next(), p.delta_t = fields.next(), p.delta_o = fields.next();
  p.activation_b = fields.next(), p.activation_t = fields.next(), p.activation_i = fields.next();
  p.out_b = fields.next(), p.out_o = fields.next();
  p.in_dtype = fields.dtype(), p.out_dtype = fields.dtype();
  return p;
}

#if defined(GRADEXT_WITH_CUDA)

// (delta, activation, B, T, O, I, strides of delta and activation)
std::vector<gradext::SqNormParams> sq_norm_params(const std::vector<py::tuple>& layers) {
  std::vector<gradext::SqNormParams> params;
  params.reserve(layers.size());
  for (const py::tuple& layer : layers) {
    Fields fields(layer, 12);
    gradext::SqNormParams p{};
    p.delta = fields.pointer(), p.activation = fields.pointer();
    p.B = fields.next(), p.T = fields.next(), p.O = fields.next(), p.I = fields.next();
    p.delta_b = fields.next(), p.delta_t = fields.next(), p.delta_o = fields.next();
    p.activation_b = fields.next(), p.activation_t = fields.next(), p.activation_i = fields.next();
    params.push_back(p);
  }
  return params;
}

#endif

class HostBuffer {
 public:
  explicit HostBuffer(std::size_t bytes) : bytes_(bytes), block_(take(bytes)) {}
  ~HostBuffer() { gradext::workspace_give_back(block_); }
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  void* data() const { return block_.data; }
  std::size_t bytes() const { return bytes_; }

 private:
  static gradext::WorkspaceBlock take(std::size_t bytes) {
    try {
      return gradext::workspace_take(bytes);
    } catch (const std::bad_alloc&) {
      PyErr_Format(PyExc_MemoryError, "gradext could not map %zu bytes of host memory for a result", bytes);
      throw py::error_already_set();
    }
  }

  std::size_t bytes_;
  gradext::WorkspaceBlock block_;
};

py::dict build_config() {
  py::dict config;
  config["version"] = GRADEXT_STRING(GRADEXT_VERSION);
  config["source_hash"] = GRADEXT_STRING(GRADEXT_SOURCE_HASH);
#if defined(__clang__)
  config["compiler"] = "clang " __clang_version__;
#else
  config["compiler"] = "gcc " __VERSION__;
#endif
  py::list archs;
#if defined(GRADEXT_WITH_CUDA)
  config["cuda"] = true;
  const int version = gradext::cuda_status().runtime_version;
  config["cuda_version"] = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  const std::string names = GRADEXT_STRING(GRADEXT_CUDA_ARCHS);
  for (std::size_t begin = 0, end; begin < names.size(); begin = end + 1) {
    end = std::min(names.find('_', begin), names.size());
    archs.append(names.substr(begin, end - begin));
  }
#else
  config["cuda"] = false;
  config["cuda_version"] = py::none();
#endif
#if defined(GRADEXT_CUDA_PTX)
  config["cuda_ptx"] = GRADEXT_STRING(GRADEXT_CUDA_PTX);
#else
  config["cuda_ptx"] = py::none();
#endif
  config["cuda_archs"] = archs;
  config["cpu_isas"] = gradext::cpu_isas();
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def("build_config", &build_config);

  m.def(
      "outer_cpu",
      [](const py::tuple& problem, int threads, std::int64_t stream_from, const std::string& isa) {
        const OuterParams params = outer_params(problem);
        const py::gil_scoped_release without_gil;
        gradext::outer_cpu(params, threads, stream_from, isa);
      },
      py::arg("problem"), py::arg("threads"), py::arg("stream_from") = -1, py::arg("isa") = "");
  m.def(
      "nt_fill_cpu",
      [](std::uintptr_t out, std::int64_t bytes, int threads) {
        gradext::nt_fill_cpu(reinterpret_cast<void*>(out), bytes, threads);
      },
      py::arg("out"), py::arg("bytes"), py::arg("threads"), without_gil);
  m.def("default_stream_from", &gradext::default_stream_from);

  py::class_<HostBuffer>(m, "HostBuffer", py::buffer_protocol(), py::module_local())
      .def(py::init<std::size_t>(), py::arg("nbytes"))
      .def_buffer([](HostBuffer& self) {
        return py::buffer_info(static_cast<unsigned char*>(self.data()), static_cast<py::ssize_t>(self.bytes()));
      });
  m.def("workspace_empty_cache", &gradext::workspace_empty_cache);
  m.def("workspace_stats", [] {
    const auto stats = gradext::workspace_stats();
    py::dict result;
    result["bytes_cached"] = stats.bytes_cached;
    result["bytes_in_use"] = stats.bytes_in_use;
    result["hits"] = stats.hits;
    result["misses"] = stats.misses;
    return result;
  });

#if defined(GRADEXT_WITH_CUDA)
  m.def(
      "outer_cuda",
      [](const std::vector<py::tuple>& problems, int device, std::uintptr_t stream) {
        std::vector<OuterParams> params;
        for (const py::tuple& problem : problems) params.push_back(outer_params(problem));
        const py::gil_scoped_release without_gil;
        gradext::outer_cuda(params, device, stream);
      },
      py::arg("problems"), py::arg("device"), py::arg("stream"));
  m.attr("MOST_LAYERS") = gradext::kMostLayers;
  py::list routes;
  for (const char* name : gradext::kSqNormRouteNames) routes.append(name);
  m.attr("SQ_NORM_ROUTES") = routes;
  m.def(
      "sq_norm_plan",
      [](const std::vector<py::tuple>& layers, int dtype, int device) {
        std::vector<std::pair<int, std::int64_t>> plans;
        for (const auto& plan : gradext::sq_norm_plan_for(sq_norm_params(layers), static_cast<DType>(dtype), device))
          plans.emplace_back(static_cast<int>(plan.route), plan.splits);
        return plans;
      },
      py::arg("layers"), py::arg("dtype"), py::arg("device"));
  m.def(
      "sq_norm_cuda",
      [](const std::vector<py::tuple>& layers, const std::vector<std::pair<int, std::int64_t>>& plans, int dtype,
         std::uintptr_t out, std::uintptr_t shares, int device, std::uintptr_t stream) {
        const auto params = sq_norm_params(layers);
        std::vector<gradext::SqNormPlan> chosen;
        for (const auto& [route, splits] : plans) chosen.push_back({static_cast<gradext::SqNormRoute>(route), splits});
        if (chosen.size() != params.size()) throw std::invalid_argument("gradext: expected a plan for each layer");
        const py::gil_scoped_release without_gil;
        gradext::sq_norm_cuda(params, chosen, static_cast<DType>(dtype), reinterpret_cast<void*>(out),
                              reinterpret_cast<void*>(shares), device, stream);
      },
      py::arg("layers"), py::arg("plans"), py::arg("dtype"), py::arg("out"), py::arg("shares"), py::arg("device"),
      py::arg("stream"));
#endif
  m.def("cuda_status", [] {
#if defined(GRADEXT_WITH_CUDA)
    const gradext::CudaStatus status = gradext::cuda_status();
#else
    const gradext::CudaStatus status{0, 0, {}, "gradext was built without CUDA: install it again where nvcc is found"};
#endif
    py::dict result;
    result["device_count"] = status.capabilities.size();
    result["capabilities"] = status.capabilities;
    result["driver_version"] = status.driver_version;
    result["runtime_version"] = status.runtime_version;
    result["reason"] = status.reason.empty() ? py::object(py::none()) : py::str(status.reason);
    return result;
  });
}
