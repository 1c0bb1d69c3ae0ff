// SPDX-License-Identifier: Apache-2.0

package load

import (
	"fmt"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// newHistogram is of nanoseconds, with three digits. A client ends before an exchange takes longer.
func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, int64(time.Minute), 3)
}

// latency is rr with the time of each exchange. At a rate, an exchange that comes late because the last
// one took long is not sent later for that: its time counts from when it was due.
func latency(fd int, to string, rate float64, h *hdrhistogram.Histogram) loop {
	b := [1]byte{again}
	return func(until int64) (units uint64, err error) {
		start := now()
		for {
			due := now()
			if rate > 0 {
				t := due
				due = start + int64(float64(units)/rate*1e9)
				if due >= until {
					return units, nil
				}
				if due > t {
					sleepUntil(due)
				}
			}
			if n, err := write(fd, &b[0], 1); n != 1 {
				return units, fmt.Errorf("send to %s: %w", to, closed(err))
			}
			if n, err := read(fd, &b[0], 1); n != 1 {
				return units, fmt.Errorf("receive from %s: %w", to, closed(err))
			}
			t := now()
			if err := h.RecordValue(t - due); err != nil {
				return units, err
			}
			units++
			if t >= until {
				return units, missed(start, until, t, units, rate, h)
			}
		}
	}
}

// missed records those exchanges that were due before a window ended and came to nothing, by the time that
// they had waited by then.
func missed(start, until, end int64, units uint64, rate float64, h *hdrhistogram.Histogram) error {
	if rate == 0 {
		return nil
	}
	for ; ; units++ {
		due := start + int64(float64(units)/rate*1e9)
		if due >= until {
			return nil
		}
		if err := h.RecordValue(end - due); err != nil {
			return err
		}
	}
}

func percentiles(h *hdrhistogram.Histogram) *Percentiles {
	return &Percentiles{
		P50: h.ValueAtQuantile(50), P90: h.ValueAtQuantile(90), P99: h.ValueAtQuantile(99),
		P999: h.ValueAtQuantile(99.9), Max: h.Max(),
	}
}
