// A key that stays in its process, seen from outside: with the real binaries, in
// the memory and the files of the agent, and over a rotation.

package integration_test

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"merlon.dev/integration/services"
	"merlon.dev/integration/stage"
	"merlon.dev/sdk"
)

// secretOf is the private part of the key that an identity uses now.
func secretOf(t *testing.T, id *sdk.Identity) []byte {
	t.Helper()
	own, err := id.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	secret, err := own.PrivateKey.(*ecdsa.PrivateKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// inMemory says whether the memory of a process holds secret.
func inMemory(t *testing.T, pid int, secret []byte) bool {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if errors.Is(err, fs.ErrPermission) {
		t.Skip("the memory of another process is for root to read")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var from, to int64
		var rights string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &from, &to, &rights); n != 3 || !strings.HasPrefix(rights, "rw") {
			continue
		}
		if holds(io.NewSectionReader(mem, from, to-from), secret) {
			return true
		}
	}
	return false
}

// holds says whether what r gives has secret in it, as far as it can be read.
func holds(r io.Reader, secret []byte) bool {
	piece, kept := make([]byte, 1<<20), 0
	for {
		n, err := r.Read(piece[kept:])
		if bytes.Contains(piece[:kept+n], secret) {
			return true
		}
		if err != nil || n == 0 {
			return false
		}
		rest := min(kept+n, len(secret)-1)
		kept = copy(piece, piece[kept+n-rest:kept+n])
	}
}

// inFiles names a file below dir that holds secret.
func inFiles(t *testing.T, dir string, secret []byte) (found string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, secret) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestKeyStaysInTheProcessThatHoldsIt(t *testing.T) {
	d := stage.Separate(t)
	dir := filepath.Dir(filepath.Dir(filepath.Dir(strings.TrimPrefix(d.WorkloadAPI, "unix://"))))

	// What the agent makes is in the agent: the search finds what there is to find.
	entryID := d.Entry("/carried")
	carried := services.Open(t, d, sdk.WithStartupTimeout(30*time.Second))
	if !inMemory(t, d.Agent.PID(), secretOf(t, carried)) {
		t.Fatal("a key that the agent made is not found in its memory: the search is of no use")
	}
	carried.Close()
	d.Merlon("entry", "delete", entryID)

	d.Entry("/me", "--key-delivery", "workload", "--ttl", "8s")
	id := services.Open(t, d, sdk.WithStartupTimeout(30*time.Second))
	if id.ID().String() != d.ID("/me") {
		t.Fatalf("ID() = %s; want /me", id.ID())
	}
	rotated := make(chan struct{}, 10)
	stop := id.OnRotate(func() { rotated <- struct{}{} })
	defer stop()
	first := secretOf(t, id)
	url := services.Serve(t, id, http.HandlerFunc(services.OK))
	grants(t, d, "http: {}")
	services.WantReason(t, "a call with the own key", client(t, id), url+"/a", "200 OK")

	// It is replaced on the same stream, with another key, and goes on serving.
	select {
	case <-rotated:
	case <-time.After(30 * time.Second):
		t.Fatal("the X509-SVID was not replaced")
	}
	second := secretOf(t, id)
	if bytes.Equal(first, second) {
		t.Error("the next X509-SVID has the same key")
	}
	services.WantReason(t, "a call with the next key", client(t, id), url+"/b", "200 OK")
	for name, secret := range map[string][]byte{"first": first, "second": second} {
		if inMemory(t, d.Agent.PID(), secret) || inMemory(t, d.CA.PID(), secret) {
			t.Errorf("the %s key is in the memory of agent or CA", name)
		}
		if path := inFiles(t, dir, secret); path != "" {
			t.Errorf("the %s key is in %s", name, path)
		}
	}

	// An agent that starts again asks for another key; what is held stays meanwhile.
	d.Agent.Restart()
	select {
	case <-rotated:
	case <-time.After(30 * time.Second):
		t.Fatal("there is no X509-SVID from the agent that started again")
	}
	services.WantReason(t, "a call after the agent's restart", client(t, id), url+"/c", "200 OK")
}
