// Workloads that are not what they were when they connected, or take more than
// their share, at the socket of the real agent (SECURITY.md T3, T38, T39, E6,
// E17, E21).

package integration_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"merlon.dev/integration/stage"
)

// process is a process of integration/workload.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

// workloadBin is integration/workload, where every user can start it.
func workloadBin(t *testing.T) string {
	t.Helper()
	bin := stage.Bin(t, stage.Build(t, "workload", "integration/workload", ""))
	openPath(t, filepath.Dir(bin))
	return bin
}

// startWorkload starts the workload as a user of the machine.
func startWorkload(t *testing.T, d *stage.Domain, uid int) *process {
	t.Helper()
	if uid != os.Geteuid() && os.Geteuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	public := strings.TrimPrefix(d.WorkloadAPI, "unix://")
	openPath(t, filepath.Dir(filepath.Dir(filepath.Dir(public))))
	stage.Eventually(t, "the agent's socket is there", func() error {
		conn, err := net.Dial("unix", public)
		if err == nil {
			conn.Close()
		}
		return err
	})
	p := &process{t: t, cmd: exec.Command(workloadBin(t))}
	p.cmd.Dir, p.cmd.Env = "/", append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET="+d.WorkloadAPI)
	p.cmd.Stderr = os.Stderr
	if uid != os.Geteuid() {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	}
	p.start()
	return p
}

func (p *process) start() {
	p.t.Helper()
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	p.stdin, p.out = stdin, bufio.NewReader(stdout)
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(p.end)
}

func (p *process) end() {
	p.stdin.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// tell gives a command, and returns the answer.
func (p *process) tell(command string) string {
	p.t.Helper()
	p.say(command)
	return p.hear()
}

func (p *process) say(command string) {
	p.t.Helper()
	if _, err := io.WriteString(p.stdin, command+"\n"); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) hear() string {
	p.t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatalf("the workload said %q: %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

func (p *process) want(command, answer string) {
	p.t.Helper()
	if got := p.tell(command); got != answer {
		p.t.Fatalf("%s: %q; want %q", command, got, answer)
	}
}

// register makes an entry for selectors on the agent of stage.Separate.
func register(t *testing.T, d *stage.Domain, path string, selectors ...string) (entryID string) {
	t.Helper()
	args := []string{"entry", "create", "-o", "json", "--spiffe-id", d.ID(path), "--parent", d.AgentID()}
	for _, s := range selectors {
		args = append(args, "--selector", s)
	}
	var entry struct {
		EntryID string `json:"entry_id"`
	}
	stage.Decode(t, d.Merlon(args...), &entry)
	return entry.EntryID
}

func byUser(uid int) string { return "unix:uid:" + strconv.Itoa(uid) }

// T3: the process at the other end becomes another program, and keeps the
// connection. What is due on its stream does not come any more, to it or
// anybody.
func TestExecOnAnOpenConnectionGetsNothingMore(t *testing.T) {
	d := stage.Separate(t)
	me := os.Geteuid()
	register(t, d, "/web", byUser(me))
	p, other := startWorkload(t, d, me), startWorkload(t, d, me)
	p.want("open", "svids /web")
	other.want("open", "svids /web")
	program := filepath.Join(stage.Dir(t), "another")
	content, err := os.ReadFile(workloadBin(t))
	if err == nil {
		err = os.WriteFile(program, content, 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := p.tell("exec " + program); got != "drains" {
		t.Fatalf("exec: %q; want drains", got)
	}
	register(t, d, "/second", byUser(me))
	other.want("next", "svids /web /second")
	// It gets the end of its stream, or of its connection.
	got := p.hear()
	d.Agent.Stop()
	for line := got; line != "end"; line = p.hear() {
		if strings.Contains(line, "/web") || strings.Contains(line, "/second") {
			t.Errorf("the other program got %s", line)
		}
	}
}

// T3: the process becomes another user. Its stream ends instead of the next
// message, and the connection is of no use any more.
func TestSetuidOnAnOpenConnectionIsRefused(t *testing.T) {
	d := stage.Separate(t)
	p := startWorkload(t, d, 0)
	register(t, d, "/root", byUser(0))
	p.want("open", "svids /root")
	p.want("setuid 4242", "done")
	register(t, d, "/user", byUser(4242))
	register(t, d, "/more", byUser(0))
	p.want("next", "error Unavailable PROCESS_CHANGED")
	p.want("open", "error Unavailable PROCESS_CHANGED")
	p.want("jwt 1 1", "made 0 error Unavailable PROCESS_CHANGED")
	startWorkload(t, d, 4242).want("open", "svids /user")
}

// E17, E21: what was due to a process that stood still is judged anew when it is
// sent; and an entry that is gone ends the stream.
func TestProcessThatStoodStillGetsWhatHoldsNow(t *testing.T) {
	d := stage.Separate(t)
	me := os.Geteuid()
	first := register(t, d, "/first", byUser(me))
	p := startWorkload(t, d, me)
	p.want("open", "svids /first")
	signal := func(sig syscall.Signal) {
		if err := p.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	register(t, d, "/second", byUser(me))
	second := startWorkload(t, d, me) // the agent has it when this one does
	second.want("open", "svids /first /second")
	signal(syscall.SIGCONT)
	p.want("next", "svids /first /second")
	d.Merlon("entry", "delete", first)
	p.want("next", "svids /second")
	d.Merlon("entry", "delete", entryOf(t, d, "/second"))
	p.want("next", "error PermissionDenied NO_MATCHING_ENTRY")
}

// T39: two processes of one user open 2 000 streams, and read none of them any
// more. The user has his share, and another notices nothing; afterwards the
// agent is what it was.
func TestOneUsersStreamsStarveNobody(t *testing.T) {
	d := stage.Separate(t)
	register(t, d, "/hog", "unix:path:"+workloadBin(t))
	me := startWorkload(t, d, 0)
	me.want("open", "svids /hog")
	var after []agentSize
	for round := range 3 {
		uid := 4242 + round // each with a share of his own
		hogs := []*process{startWorkload(t, d, uid), startWorkload(t, d, uid)}
		for _, hog := range hogs {
			hog.say("streams 1000")
		}
		open := 0
		for _, hog := range hogs {
			var n int
			answer := hog.hear()
			if _, err := fmt.Sscanf(answer, "open %d", &n); err != nil {
				t.Fatalf("streams: %q: %v", answer, err)
			}
			if open += n; n < 1000 && !strings.Contains(answer, "error ResourceExhausted") {
				t.Errorf("streams: %q; want the others refused as too many", answer)
			}
		}
		if open != 1000 {
			t.Errorf("user %d has %d streams open; want 1000", uid, open)
		}
		entry := register(t, d, fmt.Sprintf("/mine%d", round), byUser(0))
		me.want("next", fmt.Sprintf("svids /hog /mine%d", round))
		fresh := startWorkload(t, d, 0)
		fresh.want("open", fmt.Sprintf("svids /hog /mine%d", round))
		fresh.end()
		d.Merlon("entry", "delete", entry)
		me.want("next", "svids /hog")
		for _, hog := range hogs {
			hog.end()
		}
		stage.Eventually(t, "their streams are gone", func() error {
			if got := agentMetric(t, d, "merlon_agent_workload_streams"); got != 1 {
				return fmt.Errorf("%v streams; want 1", got)
			}
			return nil
		})
		after = append(after, agentSizeOf(t, d))
	}
	t.Logf("after each round: %+v", after)
	first, last := after[0], after[len(after)-1]
	if last.goroutines > first.goroutines+10 || last.files > first.files+5 {
		t.Errorf("from round to round the agent grew: %+v, %+v", first, last)
	}
	if last.residentMiB > first.residentMiB*1.5+16 {
		t.Errorf("resident memory went from %.0f to %.0f MiB over rounds that each ended with one stream", first.residentMiB, last.residentMiB)
	}
}

// A user has 1 000 new JWT-SVIDs made in a row, and then 100 a second; another
// one's share is his own.
func TestJWTSVIDsOfOneUserAreLimited(t *testing.T) {
	d := stage.Separate(t)
	register(t, d, "/hog", "unix:path:"+workloadBin(t))
	hog := startWorkload(t, d, 4242)
	hog.want("open", "svids /hog") // the agent can ask the CA now
	answer := hog.tell("jwt 1 10000")
	var made int
	if _, err := fmt.Sscanf(answer, "made %d error ResourceExhausted RATE_LIMITED", &made); err != nil || made < 1000 {
		t.Fatalf("jwt: %q, %v; want at least 1000, and then a refusal", answer, err)
	}
	startWorkload(t, d, 0).want("jwt 1 100", "made 100")
	hog.want("jwt 1 100", "made 100") // held, and no work for the CA
}

// agentSize is how much the agent takes.
type agentSize struct {
	residentMiB, goroutines float64
	files                   int
}

func agentSizeOf(t *testing.T, d *stage.Domain) agentSize {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Agent.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return agentSize{
		residentMiB: agentMetric(t, d, "process_resident_memory_bytes") / (1 << 20),
		goroutines:  agentMetric(t, d, "go_goroutines"), files: len(files),
	}
}

// agentMetric reads a metric without labels.
func agentMetric(t *testing.T, d *stage.Domain, name string) float64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.AgentHealth+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatal(err)
			}
			return value
		}
	}
	t.Fatalf("no metric %s", name)
	return 0
}
