// SPDX-License-Identifier: Apache-2.0

// Package promise ties what an operator may rely on to the test that shows it: docs/reliability.md is made from the calls of
// Kept that tests make, and from the figures that their last recorded run gave.
package promise

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
)

// Area is the heading of docs/reliability.md below which a promise stands.
type Area string

// The areas, in the order of the page.
const (
	Lifecycle  Area = "Restart, upgrade, loss"
	Pressure   Area = "Under pressure"
	Shield     Area = "The shield"
	Masquerade Area = "Masquerade"
	Hostile    Area = "Hostile containers"
	Kernels    Area = "Kernels"
	Model      Area = "Packets against the model"
	Soak       Area = "Soak"
	BadInput   Area = "Bad input"
	Cost       Area = "Cost"
)

// Areas lists all areas in the order of the page.
var Areas = []Area{Lifecycle, Pressure, Shield, Masquerade, Hostile, Kernels, Model, Soak, BadInput, Cost}

// File is the environment variable that names the file to which Kept appends its figures. Without it none are recorded.
const File = "BPFNET_PROMISES"

// Record is one line of that file, in JSON. Full says that the stated counts were run, and not a part of them.
type Record struct {
	Area    Area   `json:"area"`
	Promise string `json:"promise"`
	Test    string `json:"test"`
	Figure  string `json:"figure"`
	Full    bool   `json:"full"`
}

// Kept says that the test has shown the promise, and the figure that it measured or counted. It is called where all checks
// have been made; both area and promise are constants in the call, for the page is made by reading it. A test that has
// failed records nothing.
func Kept(t testing.TB, area Area, promise, figure string, args ...any) {
	t.Helper()
	figure = fmt.Sprintf(figure, args...)
	t.Logf("%s: %s %s", area, promise, figure)
	path := os.Getenv(File)
	if path == "" || t.Failed() {
		return
	}
	line, err := json.Marshal(Record{
		Area: area, Promise: promise, Test: testName(), Figure: figure, Full: os.Getenv("BPFNET_FULL") != "",
	})
	if err != nil {
		t.Fatalf("promise: %v", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatalf("promise: %v", err)
	}
	_, err = f.Write(append(line, '\n'))
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		t.Fatalf("promise: %v", err)
	}
}

// testName is the package and function that called Kept, as in "bpf.TestShield": the declared function, also where a
// subtest is a closure in it.
func testName() string {
	pc, _, _, ok := runtime.Caller(2)
	if !ok {
		return ""
	}
	name := runtime.FuncForPC(pc).Name()
	name = name[strings.LastIndexByte(name, '/')+1:]
	parts := strings.SplitN(name, ".", 3)
	if len(parts) < 2 {
		return name
	}
	return strings.TrimSuffix(parts[0], "_test") + "." + parts[1]
}
