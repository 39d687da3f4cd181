// `merlon explain identity` over the real agent, case by case, and the same
// reason from the Workload API.

package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"merlon.dev/integration/stage"
)

// explanation is `merlon explain identity -o json`.
type explanation struct {
	PID        int        `json:"pid"`
	AgentID    string     `json:"agent_id"`
	Synced     bool       `json:"synced"`
	Connected  bool       `json:"connected"`
	Stale      bool       `json:"stale"`
	HeardAt    *time.Time `json:"heard_at"`
	EntryCount int        `json:"entry_count"`
	Selectors  []string   `json:"selectors"`
	Notes      []string   `json:"notes"`
	Entries    []struct {
		EntryID  string   `json:"entry_id"`
		SPIFFEID string   `json:"spiffe_id"`
		Matches  bool     `json:"matches"`
		Missing  []string `json:"missing"`
	} `json:"entries"`
	Reason string `json:"reason"`
	Hint   string `json:"hint"`
}

func explainPID(t *testing.T, d *stage.Domain, pid int) (e explanation) {
	t.Helper()
	stage.Decode(t, d.Explain("identity", "--pid", strconv.Itoa(pid), "-o", "json"), &e)
	return e
}

func TestExplainIdentity(t *testing.T) {
	d := stage.Separate(t)
	p := startWorkload(t, d, os.Geteuid())
	pid := p.cmd.Process.Pid

	// No entry at all.
	stage.Eventually(t, "the agent is in sync", func() error {
		if !explainPID(t, d, pid).Synced {
			return errors.New("not in sync")
		}
		return nil
	})
	e := explainPID(t, d, pid)
	if e.PID != pid || !e.Connected || e.Stale || e.HeardAt == nil || e.AgentID != d.AgentID() || e.EntryCount != 0 ||
		!slices.Contains(e.Selectors, byUser(os.Geteuid())) || e.Reason != "NO_MATCHING_ENTRY" || !strings.Contains(e.Hint, "merlon entry create --parent "+d.AgentID()) {
		t.Errorf("without entries: %+v", e)
	}
	p.want("open", "error PermissionDenied NO_MATCHING_ENTRY")

	// A near miss and a far one: the nearest is first, with the selector that fails.
	far := register(t, d, "/far", "unix:uid:4242", "unix:gid:4242", "unix:path:/usr/bin/far")
	near := register(t, d, "/near", byUser(os.Geteuid()), "unix:path:/usr/bin/near")
	stage.Eventually(t, "the agent has both", func() error {
		if e = explainPID(t, d, pid); e.EntryCount != 2 {
			return errors.New("not yet")
		}
		return nil
	})
	if len(e.Entries) != 2 || e.Entries[0].EntryID != near || e.Entries[0].SPIFFEID != d.ID("/near") || e.Entries[0].Matches ||
		!slices.Equal(e.Entries[0].Missing, []string{"unix:path:/usr/bin/near"}) || e.Entries[1].EntryID != far || len(e.Entries[1].Missing) != 3 {
		t.Errorf("entries = %+v; want /near first, which lacks its path only", e.Entries)
	}
	if e.Reason != "NO_MATCHING_ENTRY" || !strings.Contains(e.Hint, near) || !strings.Contains(e.Hint, "unix:path:/usr/bin/near") {
		t.Errorf("reason %s, hint %q; want the nearest entry and its selector", e.Reason, e.Hint)
	}
	p.want("open", "error PermissionDenied NO_MATCHING_ENTRY")

	// A match.
	register(t, d, "/web", byUser(os.Geteuid()))
	stage.Eventually(t, "the agent has it", func() error {
		if e = explainPID(t, d, pid); e.EntryCount != 3 {
			return errors.New("not yet")
		}
		return nil
	})
	if e.Reason != "" || e.Hint != "" || !e.Entries[0].Matches || e.Entries[0].SPIFFEID != d.ID("/web") {
		t.Errorf("with a match: %+v", e)
	}
	p.want("open", "svids /web")
	if text := d.Explain("identity", "--pid", strconv.Itoa(pid)); !strings.Contains(text, "agent: in sync with the CA, 3 entries") || !strings.Contains(text, "matches "+d.ID("/web")) {
		t.Errorf("in words:\n%s", text)
	}

	// A match by which no key is handed out.
	for _, id := range []string{far, near, entryOf(t, d, "/web")} {
		d.Merlon("entry", "delete", id)
	}
	d.Merlon("entry", "create", "--spiffe-id", d.ID("/own"), "--parent", d.AgentID(), "--selector", byUser(os.Geteuid()), "--key-delivery", "workload")
	stage.Eventually(t, "the agent has it", func() error {
		if e = explainPID(t, d, pid); e.EntryCount != 1 || len(e.Entries) == 0 || !e.Entries[0].Matches {
			return errors.New("not yet")
		}
		return nil
	})
	if e.Reason != "KEY_DELIVERY_WORKLOAD" || !strings.Contains(e.Hint, "sdk.Open") {
		t.Errorf("with an entry by which no key is handed out: %+v", e)
	}
	if text := d.Explain("identity", "--pid", strconv.Itoa(pid)); !strings.Contains(text, "no X509-SVID: KEY_DELIVERY_WORKLOAD") {
		t.Errorf("in words:\n%s", text)
	}
	another := startWorkload(t, d, os.Geteuid())
	another.want("open", "error PermissionDenied KEY_DELIVERY_WORKLOAD")

	// No process, and no number of one.
	p.end()
	for args, want := range map[string]struct {
		code int
		text string
	}{
		strconv.Itoa(pid): {1, "hint: ask while the process runs"},
		"2147483647":      {1, "no process 2147483647 runs"},
		"0":               {2, "--pid 0 is not the number of a process"},
		"-1":              {2, "--pid -1 is not the number of a process"},
		"99999999999":     {2, "hint:"},
		"web":             {2, "hint:"},
	} {
		stdout, stderr, err := stage.Run(t.Context(), t, []string{"MERLON_ADMIN=" + d.AgentAdmin}, "merlon", "explain", "identity", "--pid="+args, "-o", "json")
		exit := new(exec.ExitError)
		if !errors.As(err, &exit) || exit.ExitCode() != want.code || !strings.Contains(stderr, want.text) || stdout != "" {
			t.Errorf("--pid %s: %v, stdout %q, stderr %q; want exit code %d and %q", args, err, stdout, stderr, want.code, want.text)
		}
	}
}

// T5: a container within what could be a container. Neither name counts, so there
// is no identity, and explain says why.
func TestAmbiguousContainerHasNoIdentity(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("control groups need root")
	}
	d := stage.Separate(t)
	outer, inner := strings.Repeat("1f", 32), strings.Repeat("2e", 32)
	p := startWorkload(t, d, 0)
	moveInto(t, "merlontest.slice/docker-"+outer+".scope/docker-"+inner+".scope", p.cmd.Process.Pid)
	t.Cleanup(p.end) // before its group goes
	register(t, d, "/outer", "container:id:"+outer)
	register(t, d, "/inner", "container:id:"+inner)
	p.want("open", "error PermissionDenied NO_MATCHING_ENTRY")
	e := explainPID(t, d, p.cmd.Process.Pid)
	if e.Reason != "NO_MATCHING_ENTRY" || !strings.Contains(strings.Join(e.Notes, "\n"), "a container within a container") || !strings.Contains(e.Hint, "a container within a container") {
		t.Errorf("explained as %+v; want the reason in the notes", e)
	}
}

// Before the agent knows everything it says so, and never that there is no
// identity.
func TestAgentThatIsNotInSyncSaysSo(t *testing.T) {
	t.Parallel() // it waits more than it works
	d := stage.CAAlone(t, "merlon-ca", nil)
	token := d.Token()
	d.CA.Stop()
	d.StartAgent(token.Token, token.RootHash)
	stage.Eventually(t, "the agent serves", func() error { _, err := os.Stat(d.AgentAdmin); return err })
	e := explainPID(t, d, os.Getpid())
	if e.Synced || e.Connected || e.HeardAt != nil || e.Reason != "AGENT_NOT_SYNCED" || e.AgentID != "" {
		t.Errorf("explained as %+v; want AGENT_NOT_SYNCED", e)
	}
	p := startWorkload(t, d, os.Geteuid())
	p.want("jwt 1 1", "made 0 error Unavailable AGENT_NOT_SYNCED")
}

// A process in a PID namespace that the agent does not see has no number there;
// one in a namespace below is explained by its number outside.
func TestProcessesOfOtherPIDNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("PID namespaces need root")
	}
	dir := stage.Dir(t)
	agent := exec.Command(stage.Bin(t, "merlon"), "dev", "--dir", filepath.Join(dir, "dev"), "-o", "json")
	agent.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	agent = withProc(t, agent)
	stdout, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = agent.Process.Kill(); _ = agent.Wait() }()
	d := &stage.Domain{TB: t}
	if err := json.NewDecoder(stdout).Decode(d); err != nil {
		t.Fatal(err)
	}
	d.AgentAdmin = d.Admin
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), 30*time.Second)
	defer cancel()
	api := workload.NewSpiffeWorkloadAPIClient(dialSocket(t, d.WorkloadAPI))
	err = firstOf(api.FetchX509SVID(ctx, &workload.X509SVIDRequest{}))
	if status.Code(err) != codes.Unavailable || errorReason(err) != "FOREIGN_PID_NAMESPACE" {
		t.Errorf("a process outside of the agent's namespace got %v (reason %q); want FOREIGN_PID_NAMESPACE", err, errorReason(err))
	}
	// There, 1 is merlon itself; the number of this process is of nobody.
	if e := explainPID(t, d, 1); !strings.Contains(strings.Join(e.Selectors, "\n"), "unix:path:"+stage.Bin(t, "merlon")) {
		t.Errorf("process 1 is %q; want merlon", e.Selectors)
	}
	if _, stderr, err := stage.Run(t.Context(), t, []string{"MERLON_ADMIN=" + d.AgentAdmin}, "merlon", "explain", "identity", "--pid", strconv.Itoa(os.Getpid())); err == nil ||
		!strings.Contains(stderr, "agent's PID namespace") {
		t.Errorf("this process as the agent sees it: %v, %s; want that there is none", err, stderr)
	}
}

// withProc lets cmd, which begins a PID namespace, see it in /proc.
func withProc(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	sh := exec.Command("/bin/sh", append([]string{"-c", "mount --make-rprivate / && mount -t proc proc /proc && exec \"$0\" \"$@\""}, cmd.Args...)...)
	sh.SysProcAttr, sh.Stderr = cmd.SysProcAttr, os.Stderr
	return sh
}

func errorReason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}
