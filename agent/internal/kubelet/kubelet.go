// Package kubelet asks the kubelet of this node about the pods on it: whose a
// container is, which the kernel named (SECURITY.md T5). Only the kubelet is
// asked, never the Kubernetes API: what it says is about this node alone.
//
// Many ask at the same time and often, so one list of pods serves all who ask
// within a few seconds. A container is there before the kubelet lists it, so who
// asks early waits a while. A kubelet that is away takes nothing from containers
// that it told of before.
package kubelet

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

// Where Kubernetes puts what a pod needs to call, as the agent's pod does.
const (
	DefaultTokenFile = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path
	DefaultCAFile    = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
)

// timing is how long what is waited for, and remembered.
type timing struct {
	// freshness is how old a list may be that answers: a changed label of a pod
	// counts after that.
	freshness time.Duration
	patience  time.Duration // Config.Patience
	// pause is between two requests at least.
	pause time.Duration
	// memory is how long a container counts as not listed that was waited for.
	memory time.Duration
	// keep is how old a list may be that answers while the kubelet does not.
	keep time.Duration
}

var usual = timing{freshness: 5 * time.Second, patience: 10 * time.Second, pause: 500 * time.Millisecond, memory: 30 * time.Second, keep: time.Hour}

const (
	requestTimeout = 5 * time.Second
	maxListBytes   = 64 << 20 // of some hundred pods each has tens of KiB
	maxTokenBytes  = 64 << 10
	maxUnlisted    = 10_000
)

// ErrNotListed says that the kubelet knows of no such container in that pod.
var ErrNotListed = errors.New("the kubelet does not list the container")

// Config is what a Client needs. All fields are required but Patience.
type Config struct {
	// Address is the kubelet's HTTPS port, as host:port. Its certificate must
	// be for that host.
	Address string
	// TokenFile holds the bearer token. It is read again for each request.
	TokenFile string
	// CAFile holds the certificates, in PEM, that the kubelet's must chain to.
	CAFile string
	// Patience is how long one who asks waits for a container to be listed, or
	// for the kubelet to answer. Zero means 10 s.
	Patience time.Duration
	Logger   *slog.Logger
}

// Client is safe for concurrent use. Close it.
type Client struct {
	cfg      Config
	timing   timing
	http     *http.Client
	life     context.Context // ends with Close
	end      context.CancelFunc
	requests sync.WaitGroup

	mu sync.Mutex
	// guarded by mu
	listed   list
	asked    time.Time     // when the last request began
	failure  error         // of the last request
	flight   chan struct{} // closed at the end of the request that is under way
	unlisted map[string]time.Time
}

// list is one answer of the kubelet.
type list struct {
	at         time.Time // when it was asked for
	containers map[string]Container
}

// New returns a Client. It does not touch the network.
func New(cfg Config) (*Client, error) {
	pem, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("read the kubelet's CA: no certificate in %s", cfg.CAFile)
	}
	c := &Client{cfg: cfg, timing: usual, unlisted: map[string]time.Time{}}
	c.timing.patience = cmp.Or(cfg.Patience, c.timing.patience)
	c.life, c.end = context.WithCancel(context.Background())
	c.http = &http.Client{
		Timeout: requestTimeout,
		Transport: &http.Transport{ // no proxy: the token is for the kubelet alone
			TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13},
			MaxResponseHeaderBytes: 64 << 10,
			IdleConnTimeout:        30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close ends the request that is under way, and the connection.
func (c *Client) Close() {
	c.end()
	c.requests.Wait()
	c.http.CloseIdleConnections()
}

// Container returns what the kubelet says of the container with this ID in the
// pod with this UID. It waits for one that is not listed yet. The error is
// ErrNotListed where there is none; any other means that nothing is known.
func (c *Client) Container(ctx context.Context, podUID, containerID string) (Container, error) {
	began, age := time.Now(), c.timing.freshness
	for {
		listed, failure, err := c.pods(ctx, age)
		if err != nil {
			return Container{}, err
		}
		if found, ok := listed.containers[containerID]; ok && time.Since(listed.at) < c.timing.keep {
			if found.podUID != podUID {
				return Container{}, fmt.Errorf("%w in pod %s: it lists it in pod %s", ErrNotListed, podUID, found.podUID)
			}
			return found, nil
		}
		over := time.Since(began) >= c.timing.patience
		switch {
		case failure != nil && over:
			return Container{}, failure
		case failure == nil && c.missing(containerID, over):
			return Container{}, ErrNotListed
		}
		select {
		case <-ctx.Done():
			return Container{}, ctx.Err()
		case <-time.After(c.timing.pause):
			age = c.timing.pause
		}
	}
}

// missing says whether a container was waited for in vain, now or a short while
// ago.
func (c *Client) missing(containerID string, now bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now {
		if len(c.unlisted) >= maxUnlisted {
			clear(c.unlisted) // rare; each is waited for once more
		}
		c.unlisted[containerID] = time.Now().Add(c.timing.memory)
	}
	until, ok := c.unlisted[containerID]
	if ok && !time.Now().Before(until) {
		delete(c.unlisted, containerID)
		return false
	}
	return ok
}

// pods returns the last list and, where the last request failed, why. It asks
// when the last request is older than age; all who come meanwhile wait for the
// same answer.
func (c *Client) pods(ctx context.Context, age time.Duration) (listed list, failure, err error) {
	c.mu.Lock()
	if c.flight == nil && time.Since(c.asked) >= age {
		c.asked, c.flight = time.Now(), make(chan struct{})
		c.requests.Go(c.refresh) // not of the one who asks: others wait for it
	}
	flight := c.flight
	c.mu.Unlock()
	if flight != nil {
		select {
		case <-flight:
		case <-ctx.Done():
			return list{}, nil, ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.listed, c.failure, nil
}

// refresh makes the request that is under way.
func (c *Client) refresh() {
	containers, err := c.request(c.life)
	c.mu.Lock()
	defer c.mu.Unlock()
	if before := c.failure; (err == nil) != (before == nil) { // each change is said once
		if err != nil {
			c.cfg.Logger.Warn("the kubelet does not say which pods there are; what it said before stays in use", slog.Any("err", err))
		} else {
			c.cfg.Logger.Info("the kubelet answers again")
		}
	}
	c.failure = err
	if err == nil {
		c.listed = list{at: c.asked, containers: containers}
	}
	close(c.flight)
	c.flight = nil
}

// request asks for the pods.
func (c *Client) request(ctx context.Context) (map[string]Container, error) {
	token, err := readToken(c.cfg.TokenFile)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.cfg.Address+"/pods", nil)
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the kubelet: %w", err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusUnauthorized, http.StatusForbidden:
		return nil, fmt.Errorf("ask the kubelet at %s: %s: the token in %s must be of a service account that may get nodes/proxy", c.cfg.Address, resp.Status, c.cfg.TokenFile)
	default:
		return nil, fmt.Errorf("ask the kubelet at %s: %s", c.cfg.Address, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxListBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read the kubelet's answer: %w", err)
	}
	if len(body) > maxListBytes {
		return nil, fmt.Errorf("read the kubelet's answer: it has more than %d bytes", maxListBytes)
	}
	return parse(body)
}

func readToken(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read the token for the kubelet: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokenBytes+1))
	if err != nil {
		return "", fmt.Errorf("read the token for the kubelet: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(b) > maxTokenBytes || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("read the token for the kubelet: what is in %s is no bearer token", path)
	}
	return token, nil
}
