// A trust domain whose CA has several replicas on one etcd.

package stage

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Cluster is a trust domain with several CA replicas. The embedded Domain
// administers by the first of them, which holds the root key.
type Cluster struct {
	*Domain
	Etcd     *Etcd
	Replicas []*Replica
	network  *Network // nil: all of it on loopback
}

// Replica is one CA of a Cluster.
type Replica struct {
	*Process
	ID     string // its replica_name
	Admin  string // its admin socket
	GRPC   string
	HTTPS  string // host:port
	Health string
	Data   string // its data_dir
	tb     testing.TB
}

// StartCluster starts etcd with so many members and as many CA replicas as
// asked for, each on its own addresses of loopback. There is no agent yet.
func StartCluster(tb testing.TB, members, replicas int, settings ...string) *Cluster {
	tb.Helper()
	return startCluster(tb, StartEtcd(tb, members), nil, replicas, settings...)
}

// StartCluster is the function, with each member and replica on a machine of
// its own; agents are on the test's.
func (n *Network) StartCluster(members, replicas int) *Cluster {
	n.tb.Helper()
	return startCluster(n.tb, n.StartEtcd(members), n, replicas)
}

func startCluster(tb testing.TB, etcd *Etcd, network *Network, replicas int, settings ...string) *Cluster {
	tb.Helper()
	c := &Cluster{Domain: &Domain{TB: tb, dir: Dir(tb), TrustDomain: "shop.test"}, Etcd: etcd, network: network}
	for range replicas {
		c.Add(etcd.Endpoints(), settings...)
	}
	return c
}

// Add starts one more replica, which reaches etcd at endpoints. The first one
// makes the root, the others join it.
func (c *Cluster) Add(endpoints []string, settings ...string) *Replica {
	c.TB.Helper()
	r := &Replica{ID: fmt.Sprintf("ca-%d", len(c.Replicas)+1), tb: c.TB}
	var space *Namespace
	if c.network != nil {
		space = c.network.Machine(r.ID)
		r.GRPC, r.HTTPS, r.Health = space.IP+":8443", space.IP+":8444", space.IP+":9443"
	} else {
		for _, address := range []*string{&r.GRPC, &r.HTTPS, &r.Health} {
			*address = fmt.Sprintf("127.0.0.1:%d", FreePort(c.TB))
		}
	}
	r.Admin, r.Data = filepath.Join(c.dir, r.ID, "admin.sock"), filepath.Join(c.dir, r.ID+"-data")
	text := []string{
		"trust_domain: " + c.TrustDomain, "data_dir: " + r.Data, "replica_name: " + r.ID,
		"address: " + r.GRPC, "https_address: " + r.HTTPS, "health_address: " + r.Health, "admin_socket: " + r.Admin,
		"store: etcd", "etcd_endpoints: [" + strings.Join(endpoints, ", ") + "]",
		"etcd_ca_file: " + c.Etcd.Files.CA, "etcd_cert_file: " + c.Etcd.Files.Cert, "etcd_key_file: " + c.Etcd.Files.Key,
	}
	if len(c.Replicas) > 0 {
		token := c.Token("--kind", "replica", "--name", r.ID)
		text = append(text, "join_address: "+c.Replicas[0].GRPC, "join_token: "+token.Token, "root_hash: "+token.RootHash)
	}
	config := filepath.Join(c.dir, r.ID+".yaml")
	c.write(config, strings.Join(append(text, settings...), "\n")+"\n")
	r.Process = StartOn(c.TB, space, "merlon-ca", nil, "-config", config)
	c.Replicas = append(c.Replicas, r)
	if len(c.Replicas) == 1 {
		c.Admin, c.GRPC, c.HTTPS, c.CA = r.Admin, r.GRPC, "https://"+r.HTTPS, r.Process
	}
	Eventually(c.TB, r.ID+" is ready", r.Ready)
	return r
}

// Join starts an agent that knows all replicas.
func (c *Cluster) Join() {
	c.TB.Helper()
	token := c.Token()
	var grpc, https []string
	for _, r := range c.Replicas {
		grpc, https = append(grpc, r.GRPC), append(https, r.HTTPS)
	}
	d := *c.Domain
	d.GRPC, d.HTTPS = "["+strings.Join(grpc, ", ")+"]", "["+strings.Join(https, ", ")+"]"
	d.StartAgent(token.Token, token.RootHash)
	d.GRPC, d.HTTPS, d.agentID = c.GRPC, c.HTTPS, token.AgentID
	*c.Domain = d
	c.AgentServes()
}

// By administers the trust domain through r.
func (c *Cluster) By(r *Replica) *Domain {
	d := *c.Domain
	d.Admin = r.Admin
	return &d
}

// Other is a replica that is not r.
func (c *Cluster) Other(r *Replica) *Replica {
	for _, other := range c.Replicas {
		if other != r {
			return other
		}
	}
	c.TB.Fatalf("there is no replica but %s", r.ID)
	return nil
}

// Serving is the replica that the agent is connected to.
func (c *Cluster) Serving() *Replica {
	c.TB.Helper()
	var serving *Replica
	Eventually(c.TB, "the agent is connected to a replica", func() error {
		for _, r := range c.Replicas {
			if r.cmd == nil {
				continue
			}
			stdout, _, err := c.By(r).Try("agent", "list", "-o", "json")
			if err == nil && strings.Contains(stdout, `"connected": true`) {
				serving = r
				return nil
			}
		}
		return errors.New("to none")
	})
	return serving
}

// Ready asks the replica's health port; the error holds its answer.
func (r *Replica) Ready() error { return Ready(r.Health) }

// Ready asks a health port (host:port) whether its process is ready; the error holds
// the answer.
func Ready(health string) error {
	client := http.Client{Timeout: 2 * time.Second}
	defer client.CloseIdleConnections()
	resp, err := client.Get("http://" + health + "/ready")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var body Buffer
	if err := resp.Write(&body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(body.String())
	}
	return nil
}
