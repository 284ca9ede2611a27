#pragma once

namespace gradext {

enum class DType : int { f32, f64, f16, bf16 };

}  // namespace gradext
