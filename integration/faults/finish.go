// The end of a run: what the system holds by then, the verdict, and the result that
// is written down.

package faults

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"merlon.dev/ca/capb"
	"merlon.dev/integration/faults/history"
	"merlon.dev/integration/faults/invariant"
	"merlon.dev/integration/measure"
	"merlon.dev/integration/stage"
)

// ResultsEnv names the folder for results, one JSON file a row.
const ResultsEnv = "MERLON_FAULTS_RESULTS"

// Result is what is known of a row afterwards.
type Result struct {
	Row        string              `json:"row"`
	Fault      string              `json:"fault"`
	Full       bool                `json:"full"`
	Passed     bool                `json:"passed"`
	Seed       uint64              `json:"seed"`
	Machine    measure.Machine     `json:"machine"` // as it was before
	Seconds    float64             `json:"seconds"`
	Operations map[string]int      `json:"operations"`
	Faults     int                 `json:"faults"`
	Slowest    map[string]string   `json:"slowest_recovery"`
	Numbers    map[string]string   `json:"numbers"`
	Violations map[string][]string `json:"violations"`
}

// Finish ends the clients and returns the history with all that the world holds. The
// CA must be reachable.
func (w *World) Finish() *history.History {
	w.tb.Helper()
	w.Rest()
	growths := w.settle()
	w.stopPeers()
	h := w.Snapshot()
	h.Growths = growths
	for _, kind := range []history.Kind{history.Create, history.Sign, history.Connect, history.Call, history.Beat} {
		if n := h.Count(); n[string(kind)+" ok"] == 0 {
			w.tb.Errorf("no %s has succeeded, so the run shows nothing: %v", kind, n)
		}
	}
	h.Final = w.final()
	h.Logs = make(map[string][]history.Record)
	for _, ca := range w.cas {
		h.Logs[ca.name] = w.auditLog(ca)
	}
	return h
}

// final asks the CA for everything.
func (w *World) final() history.Final {
	w.tb.Helper()
	f := history.Final{Entries: make(map[string]string), Banned: make(map[string]bool), Revoked: make(map[string]uint64)}
	stage.Eventually(w.tb, "the CA says what it has", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		admin := w.cas[0].admin
		for page := ""; ; {
			resp, err := admin.ListEntries(ctx, &capb.ListEntriesRequest{PageToken: page})
			if err != nil {
				return err
			}
			for _, e := range resp.GetEntries() {
				f.Entries[e.GetEntryId()] = e.GetSpiffeId()
			}
			if page = resp.GetNextPageToken(); page == "" {
				break
			}
		}
		agents, err := admin.ListAgents(ctx, &capb.ListAgentsRequest{})
		if err != nil {
			return err
		}
		for _, a := range agents.GetAgents() {
			f.Banned[a.GetSpiffeId()] = a.GetState() == "banned"
		}
		revoked, err := admin.ListRevocations(ctx, &capb.ListRevocationsRequest{}, grpc.MaxCallRecvMsgSize(64<<20))
		if err != nil {
			return err
		}
		f.Revocations = len(revoked.GetRevocations())
		for _, r := range revoked.GetRevocations() {
			f.Revoked[r.GetSpiffeId()] = max(f.Revoked[r.GetSpiffeId()], r.GetBeforeRevision())
		}
		policy, err := admin.GetPolicy(ctx, &capb.GetPolicyRequest{})
		f.Generation = policy.GetPolicyBundle().GetGeneration()
		return err
	})
	return f
}

// auditLog reads a CA's log, and has merlon verify it with its tree and checkpoint.
func (w *World) auditLog(ca replica) (log []history.Record) {
	w.tb.Helper()
	stage.Eventually(w.tb, "merlon log verify", func() error {
		stdout, stderr, err := w.Try("log", "verify", "--data-dir", ca.data)
		if err != nil {
			return errors.New(stdout + stderr)
		}
		return nil
	})
	files, err := filepath.Glob(filepath.Join(ca.data, "audit-*.jsonl")) // those before, in order
	if err != nil {
		w.tb.Fatal(err)
	}
	var raw []byte
	for _, file := range append(files, filepath.Join(ca.data, "audit.jsonl")) {
		text, err := os.ReadFile(file)
		if err != nil {
			w.tb.Fatal(err)
		}
		raw = append(raw, text...)
	}
	for line := range bytes.Lines(raw) {
		r := history.Record{Line: bytes.TrimSuffix(line, []byte("\n"))}
		if err := json.Unmarshal(line, &r); err != nil {
			w.tb.Fatalf("audit log of %s: %v: %s", ca.name, err, line)
		}
		log = append(log, r)
	}
	return log
}

// measure remembers the size of each process, to be compared at the end.
func (w *World) measure() {
	w.tb.Helper()
	for name, size := range w.sizes() {
		if _, known := w.before[name]; !known {
			w.before[name] = size
		}
	}
}

func (w *World) sizes() map[string]history.Size {
	w.tb.Helper()
	sizes := make(map[string]history.Size)
	add := func(name string, pid int, health string) {
		if size, err := sizeOf(name, pid, health); err == nil {
			sizes[name] = size
		} else {
			w.tb.Logf("size of %s: %v", name, err)
		}
	}
	for _, ca := range w.cas {
		add(ca.name, ca.process.PID(), ca.health)
	}
	add("agent", w.Agent.PID(), w.AgentHealth)
	for _, p := range w.peers {
		add(p.path, p.cmd.Process.Pid, "")
	}
	return sizes
}

// settle waits until processes have the size that they had, for at most 15 s: what
// is larger then is for the invariant to say.
func (w *World) settle() (growths []history.Growth) {
	w.tb.Helper()
	for range 150 {
		growths = nil
		for name, now := range w.sizes() {
			if before, ok := w.before[name]; ok {
				growths = append(growths, history.Growth{Before: before, After: now})
			}
		}
		if len(invariant.Sizes(&history.History{Growths: growths})) == 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	return growths
}

// sizeOf reads what a process takes; without a health port, of its goroutines
// nothing is known.
func sizeOf(name string, pid int, health string) (size history.Size, err error) {
	size.Process = name
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(fds)
	if err != nil {
		return size, err
	}
	for _, f := range files {
		if to, err := os.Readlink(filepath.Join(fds, f.Name())); err == nil && filepath.Ext(to) == ".sst" {
			size.Tables++
		} else {
			size.Files++
		}
	}
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return size, err
	}
	var program, resident, shared uint64 // pages
	if _, err := fmt.Sscan(string(statm), &program, &resident, &shared); err != nil {
		return size, fmt.Errorf("read what %s takes: %w", name, err)
	}
	// Without pages of files, such as tables of the store: the kernel takes them back.
	size.Resident = (resident - shared) * uint64(os.Getpagesize())
	if health != "" {
		size.Goroutines, err = goroutines(health)
	}
	return size, err
}

func goroutines(health string) (int, error) {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + health + "/metrics")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			return strconv.Atoi(text)
		}
	}
	return 0, errors.New("no metric go_goroutines")
}

// Report judges a history, fails the test where an invariant does not hold, and gives
// the result.
func Report(tb testing.TB, r Result, h *history.History) Result {
	tb.Helper()
	r.Seed, r.Operations, r.Faults = h.Seed, h.Count(), len(h.Windows)
	r.Slowest = slowest(h.Recoveries)
	r.Violations = invariant.Check(h)
	for _, name := range slices.Sorted(maps.Keys(r.Violations)) {
		found := r.Violations[name]
		r.Violations[name] = found[:min(len(found), 20)]
		tb.Errorf("%s does not hold, %d times:\n%s", name, len(found), strings.Join(r.Violations[name], "\n"))
	}
	r.Passed = !tb.Failed()
	tb.Logf("%s: %v; recoveries %v; %v", r.Row, r.Operations, r.Slowest, r.Numbers)
	return r
}

// Write writes a result down where MERLON_FAULTS_RESULTS says.
func Write(tb testing.TB, r Result) {
	tb.Helper()
	dir := os.Getenv(ResultsEnv)
	if dir == "" {
		return
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, r.Row+".json"), append(text, '\n'), 0o600)
	}
	if err != nil {
		tb.Error(err)
	}
}

func slowest(all []history.Recovery) map[string]string {
	took := make(map[string]time.Duration)
	for _, r := range all {
		took[r.What] = max(took[r.What], r.Took)
	}
	out := make(map[string]string)
	for what, d := range took {
		out[what] = d.Round(time.Millisecond).String()
	}
	return out
}

// Begun is a result with what is known before the row.
func Begun(row, fault string, full bool) Result {
	return Result{Row: row, Fault: fault, Full: full, Machine: measure.Here("."), Numbers: make(map[string]string)}
}
