// SPDX-License-Identifier: Apache-2.0

package vm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// together keeps the threads of QEMU on one processor until the channel is closed.
// In virtual time its two threads take turns, some thousand times a second of the
// guest's: waking the other one on another processor is a third of the whole cost
// of a run. Nor does one that is woken there interrupt the other (SCHED_BATCH), which
// has yet to let it have its locks.
//
// Which processor, the scheduler says, unless another guest of ours is there and
// fewer are elsewhere: every second the threads may go where they like for a moment,
// so that they flee one that others use.
func together(pid int, over <-chan struct{}) {
	var all unix.CPUSet
	if unix.SchedGetaffinity(0, &all) != nil || all.Count() < 2 {
		return
	}
	const hold, release = time.Second, 10 * time.Millisecond
	for {
		tids, cpu := threads(pid)
		cpu = processors.enter(cpu, &all)
		var one unix.CPUSet
		one.Set(cpu)
		confine(tids, &one)
		done := sleep(hold, over)
		processors.leave(cpu)
		tids, _ = threads(pid)
		if confine(tids, &all); done || sleep(release, over) {
			return
		}
	}
}

// sleep sleeps, unless a channel is closed meanwhile.
func sleep(d time.Duration, over <-chan struct{}) (closed bool) {
	select {
	case <-over:
		return true
	case <-time.After(d):
		return false
	}
}

// confine lets threads run only on these processors. Errors only mean that one has
// ended.
func confine(tids []int, set *unix.CPUSet) {
	for _, tid := range tids {
		unix.SchedSetaffinity(tid, set)
		unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}, 0)
	}
}

// processors counts the guests of this process on each.
var processors = occupied{guests: map[int]int{}}

type occupied struct {
	sync.Mutex
	guests map[int]int
}

// enter takes a processor of a set with the fewest guests, cpu if it is one of these.
func (o *occupied) enter(cpu int, set *unix.CPUSet) int {
	o.Lock()
	defer o.Unlock()
	if !set.IsSet(cpu) {
		cpu = -1
	}
	for other := range len(set) * strconv.IntSize {
		if set.IsSet(other) && (cpu < 0 || o.guests[other] < o.guests[cpu]) {
			cpu = other
		}
	}
	o.guests[cpu]++
	return cpu
}

func (o *occupied) leave(cpu int) {
	o.Lock()
	defer o.Unlock()
	o.guests[cpu]--
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
