// Stacks that give way to each other: a switch saves the registers that a function must keep, and nothing else.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pymerge::emu {

constexpr size_t kStack = 128 << 10;

// Memory of whole pages with a page on either side that nobody may touch.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    void* all = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<unsigned char*>(all) + kPage;
    if (bytes_ > 0) mprotect(begin_, bytes_, PROT_READ | PROT_WRITE);
  }
  Pages(const Pages&) = delete;
  ~Pages() { munmap(begin_ - kPage, bytes_ + 2 * kPage); }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + bytes_; }

  static constexpr size_t kPage = 4096;

 private:
  size_t bytes_;
  unsigned char* begin_;
};

#if defined(__x86_64__)

using Context = void*;  // the stack pointer; what a call must preserve lies above it

__attribute__((naked, noinline)) inline void switch_to(Context*, Context) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

// A context that begins in `enter` when it is switched to; enter never returns.
inline void prepare(Context& context, const Pages& stack, void (*enter)()) {
  void** top = reinterpret_cast<void**>(stack.end()) - 1;  // as behind a call: 8 bytes below a multiple of 16
  *top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context = top;
}

#else

using Context = ucontext_t;

inline void switch_to(Context* from, const Context& to) { swapcontext(from, &to); }

inline void prepare(Context& context, const Pages& stack, void (*enter)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.begin();
  context.uc_stack.ss_size = static_cast<size_t>(stack.end() - stack.begin());
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
}

#endif

}  // namespace pymerge::emu
