// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// together keeps the threads of QEMU on one processor until the channel is closed.
// In virtual time its two threads take turns, some thousand times a second of the
// guest's: waking the other one on another processor is a third of the whole cost
// of a run.
//
// Which processor, the scheduler says: every second the threads may go where they
// like for a moment, so that they flee one that others use.
func together(pid int, over <-chan struct{}) {
	var all unix.CPUSet
	if unix.SchedGetaffinity(0, &all) != nil || all.Count() < 2 {
		return
	}
	const hold, release = time.Second, 10 * time.Millisecond
	for wait := release; ; wait = hold + release - wait {
		select {
		case <-over:
			return
		case <-time.After(wait):
		}
		// Errors only mean that a thread has ended.
		tids, cpu := threads(pid)
		set := all
		if wait == release {
			set.Zero()
			set.Set(cpu)
		}
		for _, tid := range tids {
			unix.SchedSetaffinity(tid, &set)
		}
	}
}

// threads lists the threads of a process, and says where the busiest is or was last.
func threads(pid int) (tids []int, cpu int) {
	var most uint64
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		tid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		// proc_pid_stat(5): what is in parentheses may hold spaces; utime, stime and
		// processor are fields 14, 15 and 39, the state behind the parentheses is field 3.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if tid == 0 || len(f) < 37 {
			continue
		}
		tids = append(tids, tid)
		user, _ := strconv.ParseUint(f[11], 10, 64)
		system, _ := strconv.ParseUint(f[12], 10, 64)
		if n := user + system; n >= most {
			most = n
			cpu, _ = strconv.Atoi(f[36])
		}
	}
	return tids, cpu
}
