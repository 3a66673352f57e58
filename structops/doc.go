// SPDX-License-Identifier: Apache-2.0

// Package structops puts TCP congestion controls written in BPF into the kernel,
// and tells what is there. A congestion control is a struct tcp_congestion_ops
// whose members are BPF programs: a map of type struct_ops.
//
// The steps are
//
//	spec, err := structops.Parse(bytes)    // no kernel needed: the laws that can be checked on paper
//	obj, err := spec.Load()                // the verifier has accepted the programs; nothing is registered
//	link, err := obj.Attach("")            // the name is in tcp_available_congestion_control
//	err = link.Pin("/sys/fs/bpf/x")        // it outlives the process
//
// Spec.Verify goes as far as Load and says what the kernel made of each function,
// and why it refuses what it refuses.
//
// An Extension is another sort of object: programs that take the place of functions
// of a congestion control that is live. ParseExtension, Load for one of the
// functions (see Policies), Attach; Detach gives the function back to itself.
//
// # Lifetimes
//
// A Spec is a value: it can be loaded many times. An Object holds programs and
// maps until Close. A Link holds the registration: its Close takes the name out
// of the kernel, unless Pin was called. From Linux 6.4 on the kernel does the
// same by itself when the process ends; before, and for objects with a plain
// .struct_ops section, the registration stays until Close or Unregister.
//
// An extension lives in its pins, and holds the programs that it extends, but not
// their registration.
//
// Sockets that run a congestion control when it is unregistered go on with it
// until they close, so its map and programs may be seen for longer than its
// name.
//
// What is loaded remembers the object that it was made of (Info.Object) for as long
// as its programs live. Maps that an object pins by name outlive it: who sets
// Spec.MapPins looks after them.
//
// # What it is not
//
// The package knows nothing of any algorithm, of defaults, or of other types of
// struct_ops; and it never unregisters what it was not asked to.
//
// Loading needs Linux 5.13 with BTF and a BPF JIT, on a 64-bit machine, and
// CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; looking at other people's maps needs
// CAP_SYS_ADMIN.
package structops
