// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"ccload/harness/link"
	"ccload/harness/trace"
)

// ownMemory is what a run takes for itself, and what each flow adds, in bytes.
const (
	ownMemory  = 16 << 20
	flowMemory = 1 << 20
)

// Memory estimates the memory that a run of an experiment takes at most, in bytes:
// what ccload itself needs, the packets of the link, and TCP's. The sender keeps up
// to twice what path and buffer hold (slow start overshoots by a factor of two before
// it hears of a loss), the receiver queues as much out of order as they hold, and the
// kernel counts every packet with its overhead. Its defaults must be filled in.
func Memory(e trace.Experiment) int64 {
	l := e.Link
	hold := int64(l.Rate*l.RTT/8) + int64(l.Buffer)*int64(l.MTU)
	need := ownMemory + int64(len(e.Flows))*flowMemory + 4*hold
	if l.Kind != link.Netem { // which keeps no packets but TCP's own
		need += link.Memory(l)
	}
	return need
}

// NoMemoryError reports that a run would not fit.
type NoMemoryError struct{ Need, Have int64 } // bytes

func (e *NoMemoryError) Error() string {
	return fmt.Sprintf("needs up to %d MiB of memory, %d MiB is available", e.Need>>20, e.Have>>20)
}

// Fits returns a *NoMemoryError if a run that needs so much memory would not fit into
// what the machine has available.
func Fits(need int64) error {
	have, err := available("/")
	if err != nil {
		return err
	}
	if need > have {
		return &NoMemoryError{need, have}
	}
	return nil
}

// available reads MemAvailable (proc_meminfo(5)), in bytes; root is where proc/ is.
func available(root string) (int64, error) {
	f, err := os.Open(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return parseAvailable(f)
}

func parseAvailable(r io.Reader) (int64, error) {
	for s := bufio.NewScanner(r); s.Scan(); {
		var kib int64
		if n, _ := fmt.Sscanf(s.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("meminfo: no MemAvailable")
}
