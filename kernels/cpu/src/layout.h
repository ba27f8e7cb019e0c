// The structs that Python fills in, told to it field by field: specdec.kernels.cpu.native has a class of the same name
// for each, and a library whose structs are laid out otherwise is refused. All of it is constant data, no code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace specdec {

// Of a struct, a table of these: itself with its size in bytes, its fields with their offsets, and one without a name.
struct LayoutEntry {
  const char *name, *type;
  int64_t bytes;
};

// Made by SHARED_STRUCT.
template <class T>
struct Layout;

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_pointer_v<T>) {
    return "pointer";
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return "int32";
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return "int64";
  } else if constexpr (std::is_same_v<T, float>) {
    return "float32";
  } else if constexpr (std::is_same_v<T, double>) {
    return "float64";
  } else {
    return Layout<T>::table[0].name;
  }
}

// Below a struct, with all its fields in their order: SHARED_STRUCT(Point, FIELD(x) FIELD(y)).
#define SHARED_STRUCT(name, fields)                                                                      \
  static_assert(std::is_standard_layout_v<name>, "or it has no layout to share");                        \
  template <>                                                                                            \
  struct Layout<name> {                                                                                  \
    using Self = name;                                                                                   \
    static constexpr LayoutEntry table[] = {{#name, "struct", sizeof(Self)}, fields{nullptr, nullptr, 0}};\
  };
#define FIELD(name) {#name, type_name<decltype(Self::name)>(), offsetof(Self, name)},

}  // namespace specdec
