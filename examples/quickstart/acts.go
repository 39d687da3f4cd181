// The acts of the quickstart. Each returns an error unless it has seen what it
// shows.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// svidTTL is short, so that rotation can be watched.
const svidTTL = "8s"

func startEverything(ctx context.Context, t *theatre) error {
	if err := t.StartDev(ctx); err != nil {
		return err
	}
	fmt.Printf("trust domain %s, Workload API %s\n", t.Dev.TrustDomain, t.Short(t.Dev.WorkloadAPI))
	for _, name := range []string{"orders", "web"} {
		out, err := t.Merlon(ctx, "entry", "create", "--spiffe-id", "spiffe://dev.local/"+name,
			"--selector", "unix:path:"+t.Bin(name), "--ttl", svidTTL, "-o", "json")
		if err != nil {
			return err
		}
		var entry struct {
			SPIFFEID string `json:"spiffe_id"`
			ParentID string `json:"parent_id"`
		}
		if err := json.Unmarshal([]byte(out), &entry); err != nil {
			return err
		}
		fmt.Printf("registered %s under %s\n", entry.SPIFFEID, entry.ParentID)
	}
	if _, err := t.Merlon(ctx, "policy", "push", "examples/quickstart/policy"); err != nil {
		return err
	}
	var orders, web struct {
		Address  string `json:"address"`
		SPIFFEID string `json:"spiffe_id"`
	}
	if err := t.serve(ctx, &orders, "orders"); err != nil {
		return err
	}
	fmt.Printf("  is %s, mutual TLS on %s\n", orders.SPIFFEID, orders.Address)
	if err := t.serve(ctx, &web, "web", "--orders", "https://"+orders.Address); err != nil {
		return err
	}
	fmt.Printf("  is %s\n", web.SPIFFEID)
	t.web = "http://" + web.Address
	return nil
}

func allowedCall(ctx context.Context, t *theatre) error {
	out, err := t.call(ctx, "GET", "/orders/1")
	if err != nil {
		return err
	}
	if out.Status != 200 {
		return fmt.Errorf("GET /orders/1 was not allowed: %+v", out)
	}
	fmt.Printf("web: GET /orders/1 -> 200 from %s: %s\n", out.Server, out.Body)
	return nil
}

func deniedCall(ctx context.Context, t *theatre) error {
	out, err := t.call(ctx, "POST", "/orders/1")
	if err != nil {
		return err
	}
	if out.Reason != "METHOD" || out.DecisionID == "" {
		return fmt.Errorf("POST /orders/1 was not denied with reason METHOD: %+v", out)
	}
	fmt.Printf("web: POST /orders/1 -> %s\n", out.Error)
	why, err := t.Merlon(ctx, "explain", "decision", out.DecisionID)
	if err != nil {
		return err
	}
	if !strings.Contains(why, "web-reads-orders") {
		return fmt.Errorf("the explanation does not name the nearest grant:\n%s", why)
	}
	fmt.Print(why)
	return nil
}

// widened is the policy of the quickstart with one more method.
const widened = `grants:
  - id: web-changes-orders
    from: [spiffe://dev.local/web]
    to: [spiffe://dev.local/orders]
    http: {methods: [GET, POST], paths: ["/orders/{id}", /feed]}
`

func policyChange(ctx context.Context, t *theatre) error {
	folder := filepath.Join(t.Dir, "policy")
	if err := os.Mkdir(folder, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(folder, "grants.yaml"), []byte(widened), 0o600); err != nil {
		return err
	}
	asked := time.Now()
	if _, err := t.Merlon(ctx, "policy", "push", folder); err != nil {
		return err
	}
	for {
		out, err := t.call(ctx, "POST", "/orders/1")
		if err != nil {
			return err
		}
		if out.Status == 200 {
			fmt.Printf("web: POST /orders/1 -> 200, %d ms after the command was started; nothing was restarted\n", time.Since(asked).Milliseconds())
			return nil
		}
		if time.Since(asked) > 5*time.Second {
			return fmt.Errorf("still denied 5 s after the command: %+v", out)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func revocation(ctx context.Context, t *theatre) error {
	before, err := t.call(ctx, "GET", "/orders/1")
	if err != nil {
		return err
	}
	resp, err := t.ask(ctx, "/feed")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := firstByte(resp.Body); err != nil {
		return fmt.Errorf("the feed did not begin: %w", err)
	}
	fmt.Println("web reads an endless feed from orders")
	ended := make(chan time.Time, 1)
	go func() {
		_, _ = io.Copy(io.Discard, resp.Body) // it ends with an error, or it ends
		ended <- time.Now()
	}()
	select {
	case <-ended:
		return errors.New("the feed ended by itself")
	case <-time.After(300 * time.Millisecond):
	}
	asked := time.Now()
	if _, err := t.Merlon(ctx, "revoke", "--spiffe-id", "spiffe://dev.local/web", "--note", "quickstart"); err != nil {
		return err
	}
	select {
	case at := <-ended:
		took := at.Sub(asked)
		fmt.Printf("the feed was cut %d ms after the command was started\n", took.Milliseconds())
		if took > time.Second {
			return errors.New("that is more than the promised second")
		}
	case <-time.After(5 * time.Second):
		return errors.New("the feed was not cut within 5 s")
	}
	return anewWith(ctx, t, before.Serial)
}

// anewWith waits until web calls again, with an SVID other than the revoked
// one: its registration entry still stands, so it has got a new one.
func anewWith(ctx context.Context, t *theatre, revokedSerial string) error {
	for deadline := time.Now().Add(5 * time.Second); ; {
		out, err := t.call(ctx, "GET", "/orders/1")
		if err != nil {
			return err
		}
		if out.Status == 200 && out.Serial != revokedSerial {
			fmt.Printf("web's entry still stands: it calls again with a new SVID\n  revoked serial %s\n  new serial     %s\n", revokedSerial, out.Serial)
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("web did not come back with a new SVID: %+v", out)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func rotation(ctx context.Context, t *theatre) error {
	serials := map[string]bool{}
	calls := 0
	begun := time.Now()
	for deadline := begun.Add(15 * time.Second); len(serials) < 3; {
		out, err := t.call(ctx, "GET", "/orders/1")
		if err != nil {
			return err
		}
		if out.Status != 200 {
			return fmt.Errorf("call %d failed while SVIDs rotated: %+v", calls+1, out)
		}
		calls++
		serials[out.Serial] = true
		if time.Now().After(deadline) {
			return fmt.Errorf("web showed %d SVIDs in 15 s with a TTL of %s; expected 3", len(serials), svidTTL)
		}
		time.Sleep(2 * time.Millisecond)
	}
	fmt.Printf("%d calls in %.1f s under %d different SVIDs of web (TTL %s): none failed\n", calls, time.Since(begun).Seconds(), len(serials), svidTTL)
	return nil
}
