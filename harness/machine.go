// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"ccload/harness/link"
	"ccload/harness/trace"
)

// machine watches what else than the link shaped a run: once a second what the
// kernel has counted, and all the time whether this process runs when it wants to.
type machine struct {
	start      int64
	now        func() int64
	unseen     func() (uint64, error)
	lost       func() (uint64, error)
	threads    []int // of the link
	processors int   // of the machine, whether this process may use them or not
	stat       *os.File
	readings   []reading
	gaps       *link.Overdue

	stop    chan struct{}
	watches sync.WaitGroup
	err     error
}

// reading is of counters at a time.
type reading struct {
	at                      int64         // ns
	busy, steal, total      uint64        // ticks of all processors
	tasks                   time.Duration // for which tasks have run on any; 0: not known
	preempted, unseen, lost uint64
	waits                   []time.Duration // of each thread of the link, for a processor
}

// pulse is how often the process looks whether it runs: often enough to see a gap of
// an RTT, but no oftener than is cheap in a guest.
func pulse(rtt float64) time.Duration {
	return min(max(seconds(rtt/2), 2*time.Millisecond), 20*time.Millisecond)
}

// watchMachine begins with it, at the experiment's start.
func watchMachine(x *experiment) (*machine, error) {
	m := &machine{
		start: x.start, now: x.link.Now, unseen: x.link.Unseen, threads: x.link.Threads(),
		lost: func() (uint64, error) { return 0, nil }, stop: make(chan struct{}),
	}
	if x.ack != nil {
		m.lost = x.ack.Lost
	}
	var err error
	if m.stat, err = os.Open("/proc/stat"); err != nil {
		return nil, fmt.Errorf("watch the machine: %w", err)
	}
	if m.processors, err = processors("/"); err == nil {
		err = m.read()
	}
	if err != nil {
		m.stat.Close()
		return nil, fmt.Errorf("watch the machine: %w", err)
	}
	every := pulse(x.Link.RTT)
	m.gaps = link.NewOverdue(m.start, seconds(x.Duration), every)
	m.watches.Go(func() {
		for due := m.now() + int64(every); ; {
			select {
			case <-m.stop:
				return
			case <-time.After(time.Duration(due - m.now())):
			}
			now := m.now()
			m.gaps.Note(due, now)
			due = now + int64(every)
		}
	})
	m.watches.Go(func() {
		for n := int64(1); ; n++ {
			select {
			case <-m.stop:
				return
			case <-time.After(time.Duration(m.start + n*int64(time.Second) - m.now())):
			}
			if m.err = m.read(); m.err != nil {
				return
			}
		}
	})
	return m, nil
}

// close ends the watch with a last reading.
func (m *machine) close() error {
	close(m.stop)
	m.watches.Wait()
	if m.err == nil {
		m.err = m.read()
	}
	m.stat.Close()
	if m.err != nil {
		return fmt.Errorf("watch the machine: %w", m.err)
	}
	return nil
}

func (m *machine) read() (err error) {
	r := reading{at: m.now()}
	var b [4096]byte
	n, err := m.stat.ReadAt(b[:], 0)
	if n == 0 {
		return err
	}
	if r.busy, r.steal, r.total, err = parseStat(b[:n]); err != nil {
		return err
	}
	if b, err := os.ReadFile("/proc/schedstat"); err == nil { // where the kernel has it
		r.tasks = parseTasks(b)
	}
	for _, tid := range m.threads {
		dir := fmt.Sprintf("/proc/self/task/%d/", tid)
		if b, err := os.ReadFile(dir + "schedstat"); err == nil { // not every kernel keeps it
			r.waits = append(r.waits, parseWaited(b))
		}
		if b, err := os.ReadFile(dir + "status"); err == nil {
			r.preempted += parsePreempted(b)
		}
	}
	var uerr, lerr error
	r.unseen, uerr = m.unseen()
	r.lost, lerr = m.lost()
	m.readings = append(m.readings, r)
	return errors.Join(uerr, lerr)
}

// processors counts those that /proc/stat sums up; root is where proc/ is.
func processors(root string) (n int, err error) {
	b, err := os.ReadFile(filepath.Join(root, "proc/stat"))
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "cpu"); ok && rest[0] != ' ' {
			n++
		}
	}
	return max(n, 1), err
}

// parseStat reads the first line of /proc/stat: ticks of all processors.
func parseStat(b []byte) (busy, steal, total uint64, err error) {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := strings.Fields(string(line))
	if len(f) < 9 || f[0] != "cpu" {
		return 0, 0, 0, fmt.Errorf("/proc/stat: no such line as it should begin with: %q", line)
	}
	for i, s := range f[1:9] { // user nice system idle iowait irq softirq steal; guests' are in user
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, 0, 0, fmt.Errorf("/proc/stat: %w", err)
		}
		total += v
		switch i {
		case 3, 4:
		case 7:
			steal = v
		default:
			busy += v
		}
	}
	return busy, steal, total, nil
}

// parseTasks reads /proc/schedstat: for how long tasks have run, on all processors.
func parseTasks(b []byte) (sum time.Duration) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 8 && strings.HasPrefix(f[0], "cpu") {
			ns, _ := strconv.ParseInt(f[7], 10, 64)
			sum += time.Duration(ns)
		}
	}
	return sum
}

// busy is the share of the processors' time between two readings that somebody had:
// what tasks had, exactly, without the interrupts of idle time; or where the kernel
// does not tell that, what the ticks met. What runs in step with them, as all does
// in virtual time, they meet always or never.
func busy(a, b *reading, processors int) float64 {
	if b.tasks > 0 {
		return float64(b.tasks-a.tasks) / float64(b.at-a.at) / float64(processors)
	}
	return share(b.busy-a.busy, b.total-a.total)
}

// parseWaited reads /proc/PID/schedstat: how long a thread has waited for a processor.
func parseWaited(b []byte) time.Duration {
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	ns, _ := strconv.ParseInt(f[1], 10, 64)
	return time.Duration(ns)
}

// parsePreempted reads /proc/PID/status: how often a thread had to leave its processor.
func parsePreempted(b []byte) (n uint64) {
	_, rest, _ := bytes.Cut(b, []byte("\nnonvoluntary_ctxt_switches:"))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	n, _ = strconv.ParseUint(strings.TrimSpace(string(line)), 10, 64)
	return n
}

// What a second may have before it counts as spoiled.
const (
	// Of it, packets may be late or the process not run. Less is what the sampling of a
	// hundred flows takes from the one processor of a guest.
	spoiledShare = 0.10
	// A packet that is late by an RTT takes twice as long as on the link that was asked
	// for: a window's worth of ACKs comes at once. On links shorter than a millisecond
	// one packet may be that late, which wake-ups of an idle machine are now and then; if
	// many are, their median tells.
	spoiledLeast = time.Millisecond
	// A process that does not run is not missed for as long as the kernel has something
	// of it to send, which is about a window more than is under way; and once in a
	// second it may be missed for less than the link's throughput is known to.
	spoiledGap = 20 * time.Millisecond
	// Time that a hypervisor takes stops the kernel as well, its timers and what stamps
	// packets, which lateness alone does not always show.
	spoiledSteal = 0.10
	// Of the time of a thread of the link: what waits for it meanwhile gets its time of
	// arrival late.
	spoiledWait = 0.20
	// The only processor of a guest is at its limit when next to nothing of its time is
	// left: work of 30 µs a packet that comes at random waits for a third of a millisecond
	// then, outside the link, and without bound at 100 %.
	spoiledBusy = 0.95
)

// disturbances are the seconds of the run that were spoiled. What was read late is
// spread over the seconds since it was read before.
func (m *machine) disturbances(processors int, rtt float64, ran time.Duration, late []*link.Overdue) (all []trace.Disturbance, sum trace.Machine) {
	n := int((ran + time.Second - 1) / time.Second)
	seconds := make([]trace.Disturbance, n)
	sum.Processors = processors
	for i := range seconds {
		s := &seconds[i]
		s.Second = i
		for _, o := range late {
			l := o.Second(i)
			s.LatenessMax, s.LateShare = most(s.LatenessMax, l.Max.Seconds()), most(s.LateShare, l.Sum.Seconds())
		}
		gap := m.gaps.Second(i)
		s.Gap, s.GapShare = gap.Max.Seconds(), gap.Sum.Seconds()
	}
	for i := 1; i < len(m.readings); i++ {
		a, b := &m.readings[i-1], &m.readings[i]
		first, last := int((a.at-m.start)/int64(time.Second)), int((b.at-m.start-1)/int64(time.Second))
		busy, steal := busy(a, b, sum.Processors), share(b.steal-a.steal, b.total-a.total)
		waited := time.Duration(0)
		for j := range min(len(a.waits), len(b.waits)) {
			waited = max(waited, b.waits[j]-a.waits[j])
		}
		first = max(0, min(first, n-1))
		// A reading comes a little after the end of its second, which does not make it one
		// of the next; the last is of a second that may have just begun.
		if b.at-m.start-int64(last)*int64(time.Second) < int64(100*time.Millisecond) && last > first && i < len(m.readings)-1 {
			last--
		}
		for j := first; j <= min(last, n-1); j++ {
			s := &seconds[j]
			whole := b.total-a.total >= uint64(sum.Processors)*50 // half a second: less is too coarse
			if whole || last > first {
				s.Busy, s.Steal = most(s.Busy, busy), most(s.Steal, steal)
			}
			if len(b.waits) > 0 {
				s.Waited = most(s.Waited, waited.Seconds()/float64(last-first+1))
			}
		}
		if n > 0 {
			s := &seconds[first]
			s.Unseen, s.SamplesLost = s.Unseen+b.unseen-a.unseen, s.SamplesLost+b.lost-a.lost
			if len(m.threads) > 0 {
				before := uint64(0)
				if s.Preempted != nil {
					before = *s.Preempted
				}
				s.Preempted = new(before + b.preempted - a.preempted)
			}
		}
	}
	if k := len(m.readings) - 1; k > 0 {
		a, b := &m.readings[0], &m.readings[k]
		sum.Busy, sum.Steal = busy(a, b, sum.Processors), share(b.steal-a.steal, b.total-a.total)
	}
	longest := max(rtt, spoiledLeast.Seconds())
	percent := func(v float64) string { return fmt.Sprintf("%.0f %%", 100*v) }
	for _, s := range seconds {
		if s.Busy != nil {
			sum.BusyMax = most(sum.BusyMax, *s.Busy)
		}
		why := func(bad bool, format string, args ...any) {
			if bad {
				s.Why = append(s.Why, fmt.Sprintf(format, args...))
			}
		}
		over := func(v *float64, may float64, format string, unit func(float64) string) {
			if v != nil && *v > may {
				s.Why = append(s.Why, fmt.Sprintf(format, unit(*v)))
			}
		}
		over(s.LatenessMax, longest, "packets up to %s late", milli)
		over(s.LateShare, spoiledShare, "packets late %s of the time", percent)
		over(&s.Gap, max(longest, spoiledGap.Seconds()), "ccload did not run for %s", milli)
		over(&s.GapShare, spoiledShare, "ccload did not run %s of the time", percent)
		over(s.Steal, spoiledSteal, "%s of the processors' time stolen", percent)
		if sum.Processors > 1 {
			over(s.Waited, spoiledWait, "the link waited for a processor for %s", milli)
		} else {
			over(s.Busy, spoiledBusy, "the processor was busy %s of the time", percent)
		}
		why(s.Unseen > 0, "%s lost outside the link", counted(int(s.Unseen), "packet"))
		why(s.SamplesLost > 0, "%s lost", counted(int(s.SamplesLost), "sample"))
		if len(s.Why) > 0 {
			all = append(all, s)
		}
	}
	return all, sum
}

// most is the larger of what was known before, if anything was, and a value.
func most(before *float64, v float64) *float64 {
	if before != nil {
		v = max(v, *before)
	}
	return &v
}

func share(part, of uint64) float64 {
	if of == 0 {
		return 0
	}
	return float64(part) / float64(of)
}

func milli(s float64) string {
	if s >= 1 {
		return fmt.Sprintf("%.2f s", s)
	}
	return fmt.Sprintf("%.3g ms", s*1e3)
}
